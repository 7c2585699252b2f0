"""The exact experiment is the test of the theorem; the rest is rules and the quick preset."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.distill.divergences import DIVERGENCES
from rectiflow.recipes.exact_matching import (
    COVERING,
    SEEKING,
    ExactSettings,
    Fitted,
    fit,
    moments,
    objective,
    weighted_gradient,
)
from rectiflow.recipes.f_distill import LEARNED, PRESETS, Distilled, _checks
from rectiflow.recipes.weighted_ring import (
    SHARES,
    RingScores,
    RingSettings,
    ring_path,
    score_points,
    weighted_ring,
)
from rectiflow.training.evaluation import Scores

# Found by gradient descent on a finer grid: mean and standard deviation of the generator.
ENDS = {
    "rkl": (-1.948, 0.545),
    "sf": (-1.967, 0.524),
    "js": (-0.391, 1.991),
    "sh": (-0.377, 1.953),
    "kl": (-0.400, 2.022),
    "jf": (-0.330, 1.814),
}


@pytest.mark.parametrize(
    "name, at",
    [(name, at) for name in ENDS for at in ((-0.8, 0.8), (0.5, 2.0))]
    # The two chi-squared divergences are finite only for a wide and for a narrow generator.
    + [("pearson", (-0.4, 2.2)), ("neyman", (-0.8, 0.4))],
)
def test_weighted_gradient_is_the_gradient_of_the_divergence(name, at):
    # The theorem: both sides by the same quadrature in float64. It integrates by parts, so the grid
    # must reach to where the widest generator has no mass left.
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in at)
    settings = ExactSettings(points=801, reach=20.0)
    expected = torch.autograd.grad(objective(DIVERGENCES[name], mean, std, settings), (mean, std))
    found = weighted_gradient(DIVERGENCES[name], mean.detach(), std.detach(), settings)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ENDS)
def test_descents_end_where_each_divergence_wants_them(name):
    found = fit(DIVERGENCES[name], ExactSettings(points=201, steps=150, rate=1.0))
    assert (found.mean, found.std) == pytest.approx(ENDS[name], abs=2e-3)
    if name in SEEKING:
        assert found.std < 0.8
    else:
        assert name in COVERING
        assert found.std > 1.6


def test_forward_divergence_keeps_the_moments():
    found = fit(DIVERGENCES["kl"], ExactSettings(points=201, steps=150, rate=1.0))
    assert (found.mean, found.std) == pytest.approx(moments(), rel=0.02)


def test_times_of_the_ring_span_its_noises():
    settings = RingSettings()
    path, times = ring_path(settings)
    sigma = path.sigma(torch.tensor([times.low, times.high], dtype=torch.float64))
    # sigma(0) falls short of sigma_max by half of (sigma_min / sigma_max)².
    torch.testing.assert_close(
        sigma, torch.tensor([3.0, 0.1], dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_ring_is_scored_by_its_shares():
    settings = RingSettings()
    points = weighted_ring(20_000, settings, generator=torch.Generator().manual_seed(3))
    scores = score_points(points, settings)
    assert scores.modes == 8
    assert scores.variation < 0.015
    # Three standard deviations in the plane hold 1 - exp(-4.5) of a normal distribution.
    assert scores.near == pytest.approx(1 - math.exp(-4.5), abs=0.004)
    one = score_points(points[points[:, 0] > 1.9], settings)
    assert one.modes == 1
    assert one.variation == pytest.approx(1 - SHARES[0], abs=2e-3)
    assert sum(SHARES) == pytest.approx(1)


def states(
    *,
    narrow: float = 0.5,
    wide: float = 2.0,
    kl: float | None = None,
    ring: float = 0.1,
    js: float = 1.0,
    recall: float = 0.9,
) -> list[str]:
    """States of the checks when rkl has variation 0.2 and recall 0.8, the teacher 1 and 5."""
    mean, std = moments()
    exact = {n: Fitted(mean, narrow if n in SEEKING else wide, torch.zeros(1, 2)) for n in ENDS}
    exact["kl"] = Fitted(mean, std if kl is None else kl, torch.zeros(1, 2))
    rings = {
        n: [RingScores(8, 0.2 if n == "rkl" else ring, 1.0, torch.zeros(1, 2))] for n in LEARNED
    }

    def scores(distance: float, share: float) -> Scores:
        return Scores(distance, distance, 1.0, share, 10)

    students = {"rkl": scores(2.0, 0.8), "js": scores(js, recall), "kl": scores(2.0, 0.1)}
    made = Distilled(scores(5.0, 0.5), scores(1.0, 0.9), students, {})
    return [check.state for check in _checks(exact, rings, [made], "fd_pixels")]


def test_checks_follow_the_rules_of_the_specification():
    assert states() == ["pass"] * 7
    assert states(narrow=0.9)[0] == "fail"
    assert states(wide=1.5)[1] == "fail"
    assert states(kl=2.1)[2] == "fail"
    assert states(ring=0.3)[3] == "weak"
    assert states(js=4.0)[4:6] == ["weak", "pass"]
    assert states(js=6.0)[4:6] == ["weak", "fail"]
    assert states(recall=0.7)[6] == "weak"


def test_default_and_paper_follow_the_specification():
    default, paper = PRESETS["default"], PRESETS["paper"]
    assert default.ring.training.batch_size == 256
    assert default.ring.training.steps / default.ring.every >= 2000
    assert (default.ring.every, default.ring.seeds, default.digits.seeds) == (
        3,
        (0, 1, 2),
        (0, 1, 2),
    )
    assert default.exact.start == (-0.8, 0.8)
    assert paper.digits.data == "hub:cifar10"
    assert paper.digits.student.batch_size == 2048
    assert paper.digits.student.steps / paper.digits.every == 100_000


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("f-distill", tmp_path)
    assert len(found.table["checks"]) == 7
    # The exact experiment decides its checks even in this preset.
    assert [check["state"] for check in found.table["checks"][:3]] == ["pass"] * 3
    assert found.pictures == 3
