"""The Fréchet distance against closed forms and scipy, and its streamed moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rectiflow.training.evaluation.frechet import MomentAccumulator, Moments, frechet_distance


def sample(seed: int, n: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix


def test_equals_scipy_on_full_rank_covariances():
    from scipy.linalg import sqrtm

    a, b = Moments.of(sample(0, 200, 6)), Moments.of(sample(1, 300, 6) + 1)
    s1, s2 = a.covariance.numpy(), b.covariance.numpy()
    expected = float(((a.mean - b.mean) ** 2).sum())
    expected += np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real
    # scipy's Schur iteration and ours each round at about 1e-13 of the traces.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_equals_the_closed_form_for_diagonal_gaussians():
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    v1, v2 = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 0.0, 0.0]).double()
    a, b = Moments(m1, v1.diag(), 10), Moments(m2, v2.diag(), 10)
    expected = ((m1 - m2) ** 2).sum() + ((v1.sqrt() - v2.sqrt()) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-12)


def test_singular_sets_have_no_distance_to_themselves():
    # Five samples in 20 dimensions: square roots of noisy eigenvalues would leave about 1e-6.
    a = Moments.of(sample(0, 5, 20))
    assert 0 <= frechet_distance(a, a) < 1e-11


def test_symmetric_and_the_same_after_a_common_shift():
    x, y = sample(0, 100, 4), sample(1, 100, 4)
    plain = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance(Moments.of(y), Moments.of(x)) == pytest.approx(plain, rel=1e-12)
    # A shift of 1e6 leaves 10 digits of each number.
    moved = frechet_distance(Moments.of(x + 1e6), Moments.of(y + 1e6))
    assert moved == pytest.approx(plain, rel=1e-8)


def test_batches_and_merged_accumulators_equal_the_whole():
    x = sample(0, 101, 5) + 1000
    whole = Moments.of(x)
    parts = [MomentAccumulator() for _ in range(3)]
    for i, batch in enumerate(x.split(10)):
        parts[i % 2].update(batch)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    merged = parts[0].moments()
    assert merged.count == 101
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert torch.allclose(merged.covariance, torch.cov(x.T), rtol=1e-11)
    assert torch.allclose(Moments.of(x.split(7)).covariance, whole.covariance, rtol=1e-11)


def test_bad_features_are_named():
    total = MomentAccumulator()
    with pytest.raises(ValueError, match="shape"):
        total.update(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        total.update(torch.full((2, 2), float("nan")))
    total.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        total.moments()
    with pytest.raises(ValueError, match="width 3, before it was 2"):
        total.update(torch.zeros(1, 3))
    a, b = Moments.of(torch.eye(2)), Moments.of(torch.eye(3))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(a, b)
