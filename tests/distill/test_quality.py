"""The pair gate: zero for exact pairs, the solver's error otherwise, and what it lets pass."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.distill import PairGate, check_pairs
from rectiflow.distill.quality import frechet_distance
from rectiflow.errors import PairQualityError
from rectiflow.flows import FlowModel, VariancePreservingPath, integrate
from rectiflow.flows.couplings import Pairs


def noise(count=256, dims=2):
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(0))


def gaussian_field(std=0.5, mean=1.0):
    """The exact rectified flow from N(0, 1) to N(mean, std²): curved in time, map known."""

    def velocity(x, t):
        t = t[:, None]
        slope = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)
        return mean + slope * (x - t * mean)

    return FlowModel(velocity, shape=(2,))


def turning(speed=4.0):
    return FlowModel(lambda x, t: speed * torch.stack([-x[:, 1], x[:, 0]], 1), shape=(2,))


def check(model, steps, solver="euler", **options):
    with torch.no_grad():
        pairs = Pairs(x := noise(), integrate(model, model.path.start(x), steps, solver))
    return check_pairs(model, pairs, solver=solver, steps=steps, **options)


def test_numbers_equal_the_closed_form_of_a_rotation():
    # One Euler step of angle a/n multiplies by 1 + i a/n: everything follows by powers.
    n, a = 50, 4.0
    quality = check(turning(a), n)
    coarse, finer = (1 + 1j * a / n) ** n, (1 + 1j * a / (4 * n)) ** (4 * n)
    back = coarse * (1 - 1j * a / n) ** n
    x = noise()
    size = float(x.square().mean().sqrt())
    std = float(x.var(0).mean().sqrt())
    typical = float(x.square().mean(1).sqrt().median())
    # float32 over 250 steps.
    assert quality.round_trip_error == pytest.approx(
        abs(back - 1) * typical / float(x.std()), rel=1e-3
    )
    scale = abs(finer) * std
    # The reference's standard deviation mixes the two dimensions: equal within sampling error.
    assert quality.finer_difference == pytest.approx(abs(coarse - finer) * size / scale, rel=0.01)


def test_frechet_equals_the_matrix_formula():
    from scipy import linalg

    a, b = (
        noise(40, 5).double(),
        noise(40, 5).double().flip(0)
        @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    b = b + 1
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(linalg.sqrtm((ca @ cb).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (ca + cb - 2 * root).trace()
    # Square roots of a nearly singular product: half the digits of float64.
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_pairs_are_checked_in_batches():
    sizes, push = [], turning(1.0).net

    def seen(x, t, label):
        sizes.append(len(x))
        return push(x, t) * label[:, None]

    label = torch.linspace(0.5, 1.0, 300)
    model, x = FlowModel(seen, shape=(2,)), noise(300)
    with torch.no_grad():
        pairs = Pairs(x, integrate(model, x, 5, "euler", label=label), {"label": label})
    sizes.clear()
    parts = check_pairs(model, pairs, solver="euler", steps=5, batch_size=100)
    assert max(sizes) == 100
    assert set(sizes) == {100, 56}
    whole = check_pairs(model, pairs, solver="euler", steps=5)
    assert max(sizes) == 256
    assert parts.round_trip_error == pytest.approx(whole.round_trip_error)
    assert parts.finer_difference == pytest.approx(whole.finer_difference)


def test_straight_fields_pass_with_one_step():
    straight = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
    quality = check(straight, 1)
    assert quality.accepted
    # float32 sums.
    assert max(quality.round_trip_error, quality.finer_difference, quality.frechet) < 1e-6


@pytest.mark.parametrize(
    "solver, steps, accepted",
    [("euler", 1, False), ("euler", 2, False), ("euler", 50, True), ("euler", 100, True),
     ("rk4", 10, True), ("dopri5", 1, True)],
)  # fmt: skip
def test_enough_steps_pass_and_too_few_do_not(solver, steps, accepted):
    quality = check(gaussian_field(), steps, solver)
    assert quality.accepted == accepted
    assert bool(quality.reasons) != accepted


def test_the_difference_falls_with_the_order_of_the_solver():
    for solver, order in (("euler", 1), ("heun", 2)):
        coarse, fine = (check(turning(1.0), n, solver).finer_difference for n in (10, 20))
        # The next order's share is a tenth at these steps.
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_other_paths_start_at_their_own_scale():
    model = FlowModel(lambda x, t: torch.zeros_like(x), VariancePreservingPath(), shape=(2,))
    assert check(model, 1).accepted


def test_one_pair_that_encoding_blows_up_does_not_refuse_the_others():
    # Encoding multiplies what lies beyond 4 by e^20; generating brings it near 0.
    def velocity(x, t):
        return torch.where(x > 4, -20 * (x - 4), 0.0)

    model = FlowModel(velocity, shape=(2,))
    stray = torch.cat([noise(), torch.full((1, 2), 4.001)])
    assert (integrate(model, stray[-1:], [1.0, 0.0], "dopri5") > 100).all()
    quality = check_pairs(
        model, Pairs(stray, stray), solver="heun", steps=40, gate=PairGate(pairs=len(stray))
    )
    assert quality.accepted
    assert quality.round_trip_error == 0


def test_pairs_of_another_teacher_or_re_paired_ones_fail():
    model = gaussian_field()
    x = noise()
    target = integrate(model, x, 50)
    swapped = check_pairs(model, Pairs(x, target.roll(1, 0)), solver="euler", steps=50)
    assert not swapped.accepted
    # Re-pairing leaves the distribution of targets as it was.
    assert swapped.frechet < 0.02
    assert swapped.finer_difference > 1


def test_refusals_say_numbers_and_remedy():
    quality = check(turning(), 2)
    with pytest.raises(PairQualityError, match=r"differ from a finer solver's by [\d.]+ \(at most"):
        quality.require()
    assert "more steps or solver='dopri5'" in quality.reasons[-1]


def test_non_finite_targets_are_counted():
    x = noise()
    target = x.clone()
    target[3, 0] = float("nan")
    quality = check_pairs(gaussian_field(), Pairs(x, target), solver="euler", steps=2)
    assert (quality.finite, quality.accepted) == (False, False)
    assert quality.reasons[0].startswith("1 of 256 targets are not finite")


def test_bad_arguments():
    with pytest.raises(ValueError, match="give the solver and the steps"):
        check_pairs(gaussian_field(), Pairs(noise(), noise()))
    with pytest.raises(ValueError, match="round_trip must be > 0"):
        PairGate(round_trip=0)
    with pytest.raises(ValueError, match="two pairs or more"):
        check_pairs(gaussian_field(), Pairs(noise(1), noise(1)), solver="euler", steps=2)
