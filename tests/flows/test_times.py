import numpy as np
import pytest
import torch
from scipy import stats

from rectiflow.flows.times import Discrete, TimeSampler, Uniform

CONTINUOUS = [Uniform(), Uniform(0.001, 1.0), Uniform(0.25, 0.5)]


@pytest.mark.parametrize("times", CONTINUOUS, ids=str)
def test_density_integrates_to_one(times):
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    # One cell at each jump of the density.
    assert torch.trapezoid(times.density(grid), grid).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("times", CONTINUOUS, ids=str)
def test_samples_follow_the_density(times):
    drawn = times.sample(20_000, generator=torch.Generator().manual_seed(3)).double().numpy()
    grid = np.linspace(0, 1, 20_001)
    density = times.density(torch.from_numpy(grid)).numpy()
    steps = (density[1:] + density[:-1]) / 2 * np.diff(grid)
    cumulative = np.concatenate([[0], np.cumsum(steps)])
    found = stats.kstest(drawn, lambda t: np.interp(t, grid, cumulative))
    assert found.pvalue > 0.01


def test_discrete_times_are_equally_likely():
    times = Discrete.grid(4)
    assert times.times == (0.0, 0.25, 0.5, 0.75)
    drawn = times.sample(4000, generator=torch.Generator().manual_seed(0))
    counts = [(drawn == value).sum().item() for value in times.times]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > 0.01
    assert times.density(torch.tensor([0.25, 0.3])).tolist() == [0.25, 0.0]


def test_one_time_is_fixed():
    assert Discrete((0.0,)).sample(3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("times", [*CONTINUOUS, Discrete.grid(3)], ids=str)
def test_the_generator_decides(times):
    assert isinstance(times, TimeSampler)
    first, second = (times.sample(5, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert first.shape == (5,)


def test_bad_ranges_are_refused():
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        Uniform(0.5, 0.5)
    with pytest.raises(ValueError, match="non-empty list within"):
        Discrete(())
    with pytest.raises(ValueError, match="non-empty list within"):
        Discrete((0.0, 1.5))
    with pytest.raises(ValueError, match="steps must be > 0"):
        Discrete.grid(0)
