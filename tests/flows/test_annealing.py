"""Annealed pairs: exact schedules, the law of the mixture, its two limits."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.errors import PairStoreError
from rectiflow.flows import AnnealedPairs, FlowModel, Independent, PairSymmetry, StoredPairs
from rectiflow.flows.annealing import Constant, Cosine, Exponential, Linear, parse_schedule
from rectiflow.flows.couplings import Draw, Pairs, TensorData
from rectiflow.nets import build
from rectiflow.training import FlowMatching

# Published values at k / K = 0, 0.1, 0.25, 0.5, 1, 2, rounded to four digits.
POINTS = (0, 100, 250, 500, 1000, 2000)
VALUES = {
    "linear": (1, 0.9, 0.75, 0.5, 0, 0),
    "cosine": (1, 0.9755, 0.8536, 0.5, 0, 0),
    "exponential": (1, 0.9048, 0.7788, 0.6065, 0.3679, 0.1353),
}
KINDS = {"linear": Linear, "cosine": Cosine, "exponential": Exponential}


class Fixed:
    """The same pairs in every step."""

    def __init__(self, count: int, shape: tuple[int, ...] = (3,)) -> None:
        generator = torch.Generator().manual_seed(5)
        self.source = torch.randn(count, *shape, generator=generator)
        self.target = torch.randn(count, *shape, generator=generator)

    def draw(self, draw: Draw) -> Pairs:
        return Pairs(self.source[draw.part], self.target[draw.part])


@pytest.mark.parametrize("kind", VALUES)
def test_invariant_3_schedules_have_the_published_values(kind):
    schedule = KINDS[kind](1000)
    assert [schedule(k) for k in POINTS] == pytest.approx(VALUES[kind], abs=5e-5)


def test_ramps_say_when_no_fresh_noise_is_left():
    for schedule in (Linear(40), Cosine(40)):
        assert schedule(39) > 0
        assert schedule(schedule.ramp) == 0
    assert Exponential(40).ramp == Constant(0.1).ramp == math.inf
    assert Constant(0).ramp == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_invariant_1_mixtures_are_standard_normal_and_correlated_as_stated(share):
    base = Fixed(40_000)
    mixed = AnnealedPairs(base, Constant(share)).draw(Draw.of(40_000)).source
    both = torch.cat([base.source, mixed], 1).double()
    found = torch.cov(both.T)
    # Entries of a sample covariance of n = 40,000 scatter by sqrt(2 / n) = 0.007 at most.
    expected = torch.eye(6, dtype=torch.float64)
    expected[:3, 3:] = expected[3:, :3] = math.sqrt(1 - share**2) * torch.eye(3)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert mixed.mean(0).abs().max() < 0.02
    if share == 0:
        assert torch.equal(mixed, base.source)


def test_targets_and_conditions_are_not_touched():
    data = TensorData(torch.randn(8, 2), {"label": torch.arange(8)})
    before = Independent(data).draw(Draw.of(8, step=3))
    after = AnnealedPairs(Independent(data), Linear(10)).draw(Draw.of(8, step=3))
    assert torch.equal(after.target, before.target)
    assert torch.equal(after.condition["label"], before.condition["label"])
    assert not torch.equal(after.source, before.source)


def test_fresh_noise_is_new_in_every_step_and_a_function_of_the_draw():
    coupling = AnnealedPairs(Fixed(6), Constant(0.5))
    first = coupling.draw(Draw.of(6, step=1)).source
    assert torch.equal(coupling.draw(Draw.of(6, step=1)).source, first)
    assert not torch.equal(coupling.draw(Draw.of(6, step=2)).source, first)
    parts = [coupling.draw(Draw.of(6, step=1, part=slice(i, i + 3))).source for i in (0, 3)]
    assert torch.equal(torch.cat(parts), first)


def test_the_share_follows_the_step():
    base = Fixed(20_000)
    for step, share in ((0, 1.0), (25, 0.75), (100, 0.0)):
        mixed = AnnealedPairs(base, Linear(100)).draw(Draw.of(20_000, step=step)).source
        found = (mixed * base.source).mean() / base.source.square().mean()
        # Correlation scatters by 1 / sqrt(60,000) = 0.004.
        assert float(found) == pytest.approx(math.sqrt(1 - share**2), abs=0.02)


def model() -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return FlowModel(build("mlp", shape=(3,), width=8, depth=1, zero=False), shape=(3,))


def test_invariant_2_without_fresh_noise_it_is_reflow_bit_for_bit():
    student, pairs = model(), Fixed(32)
    for schedule, step in ((Constant(0), 0), (Linear(10), 10), (Cosine(10), 11)):
        annealed = FlowMatching(student, AnnealedPairs(pairs, schedule))
        draw = Draw.of(32, step=step)
        assert torch.equal(
            annealed.loss(draw), FlowMatching(student, pairs).loss(Draw.of(32, step=step))
        )


def test_invariant_2_with_fresh_noise_alone_the_gradient_is_a_first_flows():
    student, base = model(), Fixed(4000)
    base.target = 1 + 2 * base.source

    def gradient(coupling, first):
        losses = [
            FlowMatching(student, coupling).loss(Draw.of(4000, step=first + i)) for i in range(5)
        ]
        found = torch.autograd.grad(sum(losses), student.parameters())
        return torch.cat([g.flatten() for g in found])

    annealed = gradient(AnnealedPairs(base, Constant(1)), 0)
    fresh = gradient(Independent(TensorData(base.target)), 50)
    paired = gradient(base, 90)
    # Means of 20,000 samples scatter by a fifth of the distance to the gradient of paired ones.
    assert (annealed - fresh).norm() < 0.3 * (annealed - paired).norm()


def test_pairs_that_start_from_data_are_refused(tmp_path):
    from rectiflow.distill import generate_pairs

    flow = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
    points = TensorData(torch.randn(16, 2))
    generate_pairs(flow, tmp_path / "a", 8, steps=1, source=points)
    for coupling in (StoredPairs(tmp_path / "a"), PairSymmetry(StoredPairs(tmp_path / "a"))):
        with pytest.raises(PairStoreError, match="sources of the kind 'data', and annealing mixes"):
            AnnealedPairs(coupling)
    generate_pairs(flow, tmp_path / "b", 8, steps=1)
    AnnealedPairs(StoredPairs(tmp_path / "b"))


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("linear", Linear(300)),
        ("linear:120", Linear(120)),
        ("cosine:25%", Cosine(200)),
        ("exponential:7", Exponential(7)),
        ("constant", Constant(0)),
        ("constant:0.5", Constant(0.5)),
    ],
)
def test_schedules_from_words(text, schedule):
    assert parse_schedule(text, 800) == schedule


@pytest.mark.parametrize(
    "text, message",
    [
        ("liner", "unknown annealing schedule 'liner': did you mean 'linear'"),
        ("linear:x", "takes a number of steps or a share such as 37.5%, got 'x'"),
        ("linear:0", "ramp must be > 0, got 0"),
        ("constant:2", r"share of fresh noise must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_schedules(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text, 100)
