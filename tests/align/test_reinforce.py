"""The policy gradient against closed forms on Gaussian chains."""

from __future__ import annotations

import pytest
import torch
from tests.align.tiny import Linear, gradients, model, noises

from rectiflow.align import Reinforce
from rectiflow.align.reinforce import log_normal
from rectiflow.flows import FlowModel, StochasticEuler, integrate
from rectiflow.flows.couplings import Draw
from rectiflow.training import Trainer, TrainerSettings

STEPS = 3


def gaussian(reward, **options) -> Reinforce:
    """Chains of the field `shift` in one dimension: every state is normal."""
    flow = FlowModel(Linear(0.0, 0.3), shape=(1,))
    return Reinforce(flow, reward, steps=STEPS, rank=0, **options)


def moments(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the last state, by hand.

    On the rectified path noise is `x - t v` and `sigma = 1 - t`, so a step of length h is
    `x' = (1 - h s/2) x + h (1 + s t/2) v + sqrt(h) s n` with `s = 1 - t`.
    """
    mean, variance, h = shift * 0, shift * 0 + 1, 1 / STEPS
    for i in range(STEPS):
        t = i * h
        s = 1 - t
        keep = 1 - h * s / 2
        mean = keep * mean + h * (1 + s * t / 2) * shift
        variance = keep**2 * variance + h * s**2
    return mean, variance


@pytest.mark.parametrize("advantage", ["raw", "centred"])
@pytest.mark.parametrize("power", [1, 2])
def test_gradient_is_that_of_the_expected_reward(advantage: str, power: int) -> None:
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    mean, variance = moments(shift)
    expected = mean if power == 1 else mean**2 + variance
    (wanted,) = torch.autograd.grad(expected, shift)
    method = gaussian(lambda x: x[:, 0] ** power, advantage=advantage)
    found = []
    for seed in range(20):
        method.loss(Draw.of(20_000, seed=seed)).backward()
        found.append(-gradients(method.model)["net.shift"])
    values = torch.stack(found)
    error = float(values.std() / len(values) ** 0.5)
    # Four standard errors of 400,000 chains; the gradient is 0.9 or more.
    assert abs(float(values.mean() - wanted)) < 4 * error
    assert error < 0.03


def test_chains_are_those_of_the_sampler_and_their_moments_known() -> None:
    method = gaussian(lambda x: x[:, 0])
    x = noises(40_000, (1,))
    end, logs = method.chain(x, torch.Generator().manual_seed(2))
    same = integrate(
        method.model, x, STEPS, StochasticEuler(), generator=torch.Generator().manual_seed(2)
    )
    torch.testing.assert_close(end, same)
    mean, variance = moments(torch.tensor(0.3, dtype=torch.float64))
    # Standard errors: 0.005 and 0.007.
    assert float(end.mean()) == pytest.approx(float(mean), abs=0.02)
    assert float(end.var()) == pytest.approx(float(variance), abs=0.03)
    assert logs.shape == (40_000, STEPS)


def test_expected_score_is_zero() -> None:
    method = gaussian(lambda x: torch.ones(len(x)), advantage="raw")
    values = []
    for seed in range(20):
        method.loss(Draw.of(5000, seed=seed)).backward()
        values.append(gradients(method.model)["net.shift"])
    found = torch.stack(values)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20**0.5


def test_log_density_is_torchs() -> None:
    x, mean = noises(4, (3,)), noises(4, (3,), seed=2)
    std = torch.rand(4, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    wanted = torch.distributions.Normal(mean, std.expand(4, 3)).log_prob(x).sum(1)
    torch.testing.assert_close(log_normal(x, mean, std), wanted)


def test_checkpoints_change_no_bit() -> None:
    found = []
    for checkpoint in (True, False):
        method = Reinforce(model(), lambda x: x.mean(1), checkpoint=checkpoint, rank=0)
        method.loss(Draw.of(6)).backward()
        found.append(gradients(method.model))
    assert found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_no_gradient_is_asked_of_the_reward() -> None:
    method = Reinforce(model(), lambda x: (x.mean(1) > 0).float())
    start = {n: p.clone() for n, p in method.model.named_parameters()}
    trained = Trainer(method, TrainerSettings(steps=3, batch_size=16, ema=0.0)).fit()
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert all("lora_" in n for n in moved)


def test_equal_rewards_move_nothing() -> None:
    method = Reinforce(model(), lambda x: torch.ones(len(x)))
    method.loss(Draw.of(6)).backward()
    assert all(not bool(g.any()) for g in gradients(method.model).values())


def test_one_sample_is_compared_with_none() -> None:
    for advantage in ("centred", "standardised"):
        method = Reinforce(model(), lambda x: x.mean(1), advantage=advantage)
        with pytest.raises(ValueError, match="got one sample, which teaches nothing"):
            method.loss(Draw.of(4, part=slice(1, 2)))
    method = Reinforce(model(), lambda x: x.mean(1), advantage="raw")
    method.loss(Draw.of(1)).backward()
    assert any(bool(g.any()) for g in gradients(method.model).values())


def test_means_since_the_last_call_take_no_room() -> None:
    method = Reinforce(model(), lambda x: x.mean(1))
    values = []
    method.reward = lambda x, **condition: values.append(x.mean(1)) or values[-1]
    for step in range(3):
        method.loss(Draw.of(4, step=step))
    assert set(method._seen) == {"reward"}
    assert method.take() == {"reward": pytest.approx(float(torch.cat(values).mean()))}
    assert method.take() == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"noise": 0.0}, "noise must be > 0"),
        ({"advantage": "standardized"}, "did you mean 'standardised'"),
        ({"steps": [1.0, 0.0]}, "forward in time only"),
    ],
)
def test_errors(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reinforce(model(), lambda x: x.mean(1), **options)
