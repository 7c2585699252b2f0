"""Times that look more often at noise: the density of the paper, and draws that follow it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from rectiflow.flows import TimeSampler, TowardNoise
from rectiflow.flows.specs import parse_times


def test_density_is_the_papers() -> None:
    # Over noise levels s = 1 - t.
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(TowardNoise().density(1 - s), 1 - 0.5 * torch.cos(math.pi * s))
    first, last = TowardNoise().density(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert first / last == pytest.approx(3, abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_density_sums_and_integrates_to_one(strength: float) -> None:
    times = TowardNoise(strength)
    count = 1000
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # The midpoint rule is exact for a cosine over half its period.
    assert float(times.density(middles).sum()) / count == pytest.approx(1, abs=1e-12)
    assert times.cdf(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 1], abs=1e-7)
    grid = torch.linspace(0, 0.3, 20_001, dtype=torch.float64)
    area = float(torch.trapezoid(times.density(grid), grid))
    assert float(times.cdf(grid[-1])) == pytest.approx(area, abs=1e-9)
    assert times.density(torch.tensor([-0.1, 1.1])).tolist() == [0, 0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_samples_follow_the_density(strength: float) -> None:
    times = TowardNoise(strength)
    assert isinstance(times, TimeSampler)
    t = times.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert torch.equal(t, times.sample(20_000, generator=torch.Generator().manual_seed(0)))
    test = stats.kstest(t.double().numpy(), lambda s: times.cdf(torch.from_numpy(s)).numpy())
    assert test.pvalue > 1e-3  # the seed is fixed: no flake


def test_words() -> None:
    assert parse_times("toward-noise") == TowardNoise()
    assert parse_times("toward-noise:0.25") == TowardNoise(0.25)


def test_wrong_strengths() -> None:
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]"):
        TowardNoise(1.5)
