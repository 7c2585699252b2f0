"""Precision and recall against a loop over all pairs."""

from __future__ import annotations

import pytest
import torch

from rectiflow.training.evaluation.manifold import precision_recall


def covered_by_loop(points: torch.Tensor, centres: torch.Tensor, k: int) -> float:
    inside = 0
    radii = [
        sorted(float((c - o).norm()) for j, o in enumerate(centres) if j != i)[k - 1]
        for i, c in enumerate(centres)
    ]
    for p in points:
        inside += any(float((p - c).norm()) <= r for c, r in zip(centres, radii))
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_equals_the_loop(k, chunk):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(30, 2, generator=generator)
    fake = torch.randn(25, 2, generator=generator) * 0.5 + 0.7
    result = precision_recall(real, fake, neighbours=k, chunk=chunk)
    assert result.precision == covered_by_loop(fake.double(), real.double(), k)
    assert result.recall == covered_by_loop(real.double(), fake.double(), k)
    assert 0 < result.recall < 1


def test_equal_sets_are_covered_even_when_points_repeat_far_from_the_origin():
    points = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    repeated = points.repeat(5, 1)
    for sets in (points, repeated):
        result = precision_recall(sets, sets.flip(0))
        assert (result.precision, result.recall) == (1.0, 1.0)


def test_dropped_modes_cost_recall_and_outliers_precision():
    near = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    both = torch.cat([near, near + 100])
    dropped = precision_recall(both, near.repeat(2, 1))
    assert (dropped.precision, dropped.recall) == (1.0, 0.5)
    outliers = precision_recall(near, torch.cat([near[:20], near[:20] + 1000]))
    assert outliers.precision == 0.5


def test_bad_features_are_named():
    x = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="more than neighbours=5"):
        precision_recall(x, x, neighbours=5)
    with pytest.raises(ValueError, match="shapes"):
        precision_recall(x, x[:, :1])
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(x, x / 0)
    with pytest.raises(ValueError, match=">= 1"):
        precision_recall(x, x, neighbours=0)
