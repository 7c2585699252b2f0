"""Chains with gradient: the same states as `integrate`, exact gradients, memory of one step."""

from __future__ import annotations

import pytest
import torch
from tests.align.tiny import Linear, gradients, model, noises

from rectiflow.align import Fixed, Uniform, peak_bytes, sample_with_gradient
from rectiflow.flows import ClassifierFreeGuidance, FlowModel, integrate, solvers
from rectiflow.nets import MLP

SOLVERS = solvers.names()


def reached(flow, solver: str, *, seed: int = 3, x: torch.Tensor | None = None, **options):
    generator = torch.Generator().manual_seed(seed)
    x = noises() if x is None else x
    return sample_with_gradient(flow, x, 5, solver, generator=generator, **options), generator


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_states_are_those_of_integrate(solver: str, checkpoint: bool) -> None:
    flow = model()
    wanted = integrate(flow, noises(), 5, solver, generator=torch.Generator().manual_seed(3))
    for first in (0, 3):
        found, _ = reached(flow, solver, first=first, checkpoint=checkpoint)
        if solver == "dopri5":
            # The velocity at the start of an interval is evaluated again here, at a rounded time.
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_checkpoints_change_no_bit_of_the_gradient(solver: str, first: int) -> None:
    """Invariant 2. The replayed steps draw the same noise and know which step they are."""
    # An adaptive solver cannot settle on a step where the field is random.
    flow = model(dropout=0.0 if solver == "dopri5" else 0.5).train()
    found, states = [], []
    for checkpoint in (True, False):
        torch.manual_seed(0)
        x, generator = reached(flow, solver, first=first, checkpoint=checkpoint)
        x.square().sum().backward()
        found.append(gradients(flow))
        states.append(generator.get_state())
    assert found[0].keys() == found[1].keys()
    assert found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(bool(g.any()) for g in found[0].values())
    assert torch.equal(*states)


@pytest.mark.parametrize("solver", ["euler", "heun", "heun-euler", "first-order", "reinterpolate"])
def test_whole_gradient_is_that_of_finite_differences(solver: str) -> None:
    """Invariant 1."""
    flow = model((2,)).double()
    flow.requires_grad_(False)
    x = noises(2, (2,)).double()
    name = "net.blocks.0.inner.weight"
    weight = flow.get_parameter(name).detach().clone().requires_grad_(True)

    def end(weight: torch.Tensor) -> torch.Tensor:
        def velocity(x, t):
            return torch.func.functional_call(flow, {name: weight}, (x, t))

        field = FlowModel(velocity)
        return sample_with_gradient(field, x, 3, solver)

    assert torch.autograd.gradcheck(end, (weight,))


def test_last_step_alone_has_its_closed_form() -> None:
    """Invariant 3: `d x_N / d theta = h x_(N-1)` for the field `theta x`."""
    net = Linear(0.5)
    x = noises(4, (1,)).double()
    steps, h = 6, 1 / 6
    sample_with_gradient(net, x, steps, first=steps - 1).sum().backward()
    before = x * (1 + h * 0.5) ** (steps - 1)
    torch.testing.assert_close(net.theta.grad, h * before.sum())


@pytest.mark.parametrize("first", range(4))
def test_every_cut_has_its_closed_form(first: int) -> None:
    """`x_N = x_k (1 + h theta)^(N-k)` with x_k held fixed."""
    net, x, steps = Linear(0.5), torch.ones(1, 1, dtype=torch.float64), 4
    sample_with_gradient(net, x, steps, first=first).sum().backward()
    h, kept = 0.25, steps - first
    wanted = (1 + h * 0.5) ** first * kept * h * (1 + h * 0.5) ** (kept - 1)
    assert float(net.theta.grad) == pytest.approx(wanted, rel=1e-12)


def test_gradient_does_not_ask_how_the_earlier_steps_were_run() -> None:
    """Invariant 4: without a graph, or with one whose predictions and states are detached."""
    flow, first, steps = model(), 2, 5
    reached(flow, "euler", first=first)[0].square().sum().backward()
    ours = gradients(flow)
    x = noises()
    for index in range(steps):
        t = torch.full((len(x),), index / steps)
        v = flow.velocity(x, t)
        x = x + (v.detach() if index < first else v) / steps
    x.square().sum().backward()
    theirs = gradients(flow)
    for name, value in ours.items():
        # The other loop adds in another order.
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5)


def test_uniform_cuts_average_over_all_cuts() -> None:
    """Invariant 6."""
    flow, steps = model(), 5
    flow.double()

    def gradient(first: int) -> torch.Tensor:
        x = sample_with_gradient(flow, noises().double(), steps, first=first)
        x.square().sum().backward()
        return torch.cat([g.flatten() for g in gradients(flow).values()])

    drawn = [Uniform().first(steps, (i + 0.5) / 40) for i in range(40)]
    mean = torch.stack([gradient(first) for first in drawn]).mean(0)
    every = torch.stack([gradient(Fixed(k).first(steps, 0.0)) for k in range(steps)]).mean(0)
    torch.testing.assert_close(mean, every)


def test_guided_fields_carry_gradient_through_both_branches() -> None:
    flow = model(classes=3)
    guided, label = ClassifierFreeGuidance(flow, 3.0), torch.tensor([0, 1, 2, 0, 1])
    sample_with_gradient(guided, noises(), 3, label=label).sum().backward()
    rows = [p.grad for n, p in flow.named_parameters() if "label" in n and p.grad is not None]
    assert bool(rows[0].flatten(1)[3].any()), "the null row is trained too"


def test_correctors_are_part_of_the_chain() -> None:
    net = Linear(0.5)
    x = torch.ones(1, 1, dtype=torch.float64)
    end = sample_with_gradient(net, x, 2, correctors=(lambda step: 2 * step.after,))
    end.sum().backward()
    # x -> 2 (1 + h theta) x, twice.
    assert float(end) == pytest.approx(4 * 1.25**2)
    assert float(net.theta.grad) == pytest.approx(4 * 2 * 0.5 * 1.25)


def test_gradient_reaches_the_source_only_with_the_whole_chain() -> None:
    flow = model()
    x = noises().requires_grad_(True)
    sample_with_gradient(flow, x, 3).sum().backward()
    assert bool(x.grad.any())
    x.grad = None
    sample_with_gradient(flow, x, 3, first=1).sum().backward()
    assert x.grad is None


def test_memory_hardly_grows_with_the_number_of_steps() -> None:
    net = MLP(shape=(16,), width=128, depth=4, zero=False)
    flow, x = FlowModel(net, shape=(16,)), noises(64, (16,))

    def peak(steps: int, checkpoint: bool) -> int:
        def run() -> None:
            sample_with_gradient(flow, x, steps, checkpoint=checkpoint).sum().backward()
            flow.zero_grad(set_to_none=True)

        run()
        return peak_bytes(run)

    assert peak(40, True) / peak(10, True) < 1.3
    assert peak(40, False) / peak(10, False) > 2.5


def test_peak_counts_what_is_alive_together() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert peak_bytes(run) == 8000


def test_peak_counts_where_the_tensors_are(monkeypatch) -> None:
    """A graphics card beside them changes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak_bytes(lambda: torch.zeros(10) + 1) == 80


@pytest.mark.parametrize("first", [-1, 5])
def test_first_must_be_a_step(first: int) -> None:
    with pytest.raises(ValueError, match="first must be a step from 0 to 4"):
        sample_with_gradient(model(), noises(), 5, first=first)
