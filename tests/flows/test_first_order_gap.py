"""The first-order gap: zero where few steps are exact, whatever the path's curvature."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import (
    CosinePath,
    EDMPath,
    FlowModel,
    GaussianField,
    PairedGaussian,
    RectifiedPath,
    VariancePreservingPath,
    integrate,
)
from rectiflow.flows.metrics import first_order_gap, straightness
from rectiflow.flows.schedules import SchedulePath
from rectiflow.nets import build

MEAN = torch.tensor([2.0, -1.0], dtype=torch.float64)
STD = torch.tensor([0.4, 1.5], dtype=torch.float64)
CURVED = [CosinePath(), VariancePreservingPath(), SchedulePath("linear", 1e-4, 0.02)]


def points(count=50):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def test_gap_by_hand():
    # Noise t on the rectified path: N̄ = 0.25 over the steps that start at 0 and 0.5.
    field = FlowModel(lambda x, t: t[:, None].expand_as(x), VariancePreservingPath(), "noise")
    found = first_order_gap(field, points(), 2)
    assert found.total == pytest.approx(0.0625, rel=1e-6)
    assert found.per_time.tolist() == pytest.approx([0.0625, 0.0625], rel=1e-6)
    assert found.times == [0.0, 0.5]
    # An uneven grid weights the steps by their lengths, here 1/4 and 3/4.
    uneven = first_order_gap(field, points(), [0.0, 0.25, 1.0])
    assert uneven.total == pytest.approx(0.25**2 * 0.25 * 0.75, rel=1e-6)


@pytest.mark.parametrize("path", [*CURVED, EDMPath(), RectifiedPath()], ids=lambda p: p.name)
def test_exact_pairs_have_no_gap_and_any_steps_agree(path):
    field, z = PairedGaussian(MEAN, STD, path), points()
    found = first_order_gap(field, z, 20)
    # Rounding of z = x / alpha, up to 150 on the VP path; EDM carries noise 80.
    assert found.total < 1e-12
    assert found.straightness < 1e-12
    start = path.start(z)
    one, two, eight = (integrate(field, start, n, "first-order") for n in (1, 2, 8))
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(one, eight, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", CURVED, ids=lambda p: p.name)
def test_straightness_sees_the_curve_of_the_path_and_the_gap_does_not(path):
    exact, z = PairedGaussian(MEAN, STD, path), points()
    times = [i / 20 * 0.99 for i in range(21)]
    assert straightness(exact, z, times, solver="first-order").total > 0.1
    independent = GaussianField(MEAN, STD, path)
    assert first_order_gap(independent, z, 20).total > 100 * first_order_gap(exact, z, 20).total


def test_source_as_reference_counts_the_distance_from_the_start():
    field, z = PairedGaussian(MEAN, STD, CosinePath()), points()
    assert first_order_gap(field, z, 10, reference="source").total < 1e-20
    other = GaussianField(MEAN, STD, CosinePath())
    mean, source = (first_order_gap(other, z, 20, reference=r).total for r in ("mean", "source"))
    # The mean is the reference of least squared distance.
    assert source > mean > 0
    assert first_order_gap(other, z, 20).straightness >= mean


def test_bins_average_steps_and_keep_the_total():
    field, z = GaussianField(MEAN, STD, CosinePath()), points()
    fine, coarse = first_order_gap(field, z, 20), first_order_gap(field, z, 20, bins=5)
    assert coarse.times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    torch.testing.assert_close(coarse.per_time, fine.per_time.view(5, 4).mean(1))
    assert float(coarse.per_time.mean()) == pytest.approx(fine.total, rel=1e-12)


def test_batches_and_conditions_do_not_change_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(2,), width=8, depth=1, classes=3, zero=False)
    model = FlowModel(net, CosinePath(), shape=(2,))
    z, label = points().float(), torch.arange(50) % 3
    whole = first_order_gap(model, z, 5, label=label)
    parts = first_order_gap(model, z, 5, label=label, batch_size=7)
    assert parts.total == pytest.approx(whole.total, rel=1e-5)
    assert first_order_gap(model, z, 5, label=label.flip(0)).total != whole.total


def test_plain_callables_are_on_straight_lines():
    assert first_order_gap(lambda x, t: torch.ones_like(x), points(), 4).total < 1e-20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reference": "noise"}, "unknown reference 'noise'"),
        ({"bins": 7, "steps": 5}, "7 bins of time need a step each, the grid has 5 steps"),
        ({"steps": [1.0, 0.0]}, "times must rise from noise to data, got 1 to 0"),
        ({"batch_size": 0}, "batch_size must be > 0"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    options = {"steps": 5, **options}
    with pytest.raises(ValueError, match=message):
        first_order_gap(lambda x, t: x, points(), **options)
