"""RF-Solver in stock pipelines: our solver's latents, saved settings, refusals."""

from __future__ import annotations

import pytest
import torch
from tests.interop.pipelines import (
    PROMPTS,
    SIZE,
    ddim,
    flow_scheduler,
    noises,
    shared,
    stock,
    tokens,
)

from rectiflow.flows import integrate, sample
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.interop.diffusers import (
    RFSolverScheduler,
    encode_prompts,
    from_pipeline,
    stock_times,
    to_pipeline,
)


@pytest.fixture
def with_scheduler():
    """A shared pipeline under another scheduler until the test ends."""
    changed = []

    def change(name, theta):
        pipe = shared(name)
        changed.append((pipe, pipe.scheduler))
        pipe.scheduler = RFSolverScheduler.of(pipe.scheduler, theta=theta)
        return pipe

    yield change
    for pipe, scheduler in changed:
        pipe.scheduler = scheduler


@pytest.mark.parametrize("theta", [0.5, 0.75])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_stock_pipelines_take_our_steps(name, theta, with_scheduler) -> None:
    model = from_pipeline(shared(name), size=SIZE, tokens=tokens(name))
    given = encode_prompts(shared(name), PROMPTS, tokens=tokens(name), cache=None).everything()
    times = stock_times(shared(name), 3, shape=(4, 8, 8))
    field = ClassifierFreeGuidance(model, 2.0)
    if name == "flux":
        field, given["guidance"] = model, torch.full((len(PROMPTS),), 2.0)
    with torch.no_grad():
        ours = integrate(field, noises(), times, f"rf-solver:{theta}", **given)
    expected = stock(name, with_scheduler(name, theta), 3, guidance=2.0)
    # The same single-precision steps on a small net as for Euler's method.
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    euler = integrate(field, noises(), times, **given)
    assert (ours - euler).abs().max() > 1e-3


def test_pipelines_under_it_are_read_with_its_steps(with_scheduler) -> None:
    pipe = with_scheduler("sd3", 0.75)
    model = from_pipeline(pipe, size=SIZE, steps=3, tokens=tokens("sd3"))
    assert model.sampling["solver"] == "rf-solver:0.75"
    assert model.net.reading.steps == 1000
    table = encode_prompts(pipe, PROMPTS, tokens=tokens("sd3"), cache=None)
    made = sample(model, source=noises(), **table.everything())
    torch.testing.assert_close(made, stock("sd3", pipe, 3), atol=1e-4, rtol=1e-4)
    assert to_pipeline(model, pipe).scheduler is pipe.scheduler


def test_order_is_two() -> None:
    """On x' = -x the error falls by four where the step is halved."""
    errors = []
    for steps in (16, 32):
        scheduler = RFSolverScheduler.of(flow_scheduler())
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        x = torch.ones(1, 1)
        for timestep in scheduler.timesteps:
            x = scheduler.step(x, timestep, x, return_dict=False)[0]
        errors.append(abs(float(x) - torch.exp(torch.tensor(-1.0)).item()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_settings_are_saved(tmp_path) -> None:
    RFSolverScheduler.of(flow_scheduler(shift=3.0), theta=0.75).save_pretrained(tmp_path)
    found = RFSolverScheduler.from_pretrained(tmp_path)
    assert (found.theta, found.config.shift) == (0.75, 3.0)


def test_later_beginnings_start_whole_steps() -> None:
    """Image to image begins inside the grid, at multiples of the order."""
    scheduler = RFSolverScheduler.of(flow_scheduler())
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    x = torch.ones(1, 1)
    first = scheduler.step(x, scheduler.timesteps[2], x).prev_sample
    wanted = 1 + float(scheduler.sigmas[3] - scheduler.sigmas[2])
    assert float(first) == pytest.approx(wanted, rel=1e-6)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="is the second of a step"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="theta must be in"):
        RFSolverScheduler.of(flow_scheduler(), theta=0.0)
    with pytest.raises(ValueError, match="DDIMScheduler does not"):
        RFSolverScheduler.of(ddim())
