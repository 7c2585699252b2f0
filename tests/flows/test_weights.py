"""Loss weights against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.flows import L2, Regression, Weighted
from rectiflow.flows.diffusion_paths import CosinePath
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.weights import WEIGHTS

FORMULAS = {
    "snr": lambda t: (t / (1 - t)) ** 2,
    "inverse-snr": lambda t: ((1 - t) / t) ** 2,
    "snr+1": lambda t: (t / (1 - t)) ** 2 + 1,
    "karras": lambda t: (t / (1 - t)) ** 2 + 4,
    "truncated": lambda t: max((t / (1 - t)) ** 2, 1),
    "clipped": lambda t: min((t / (1 - t)) ** 2, 5),
    "squared-noise": lambda t: (1 - t) ** 2,
}


def regression(times, path=None):
    t = torch.tensor(times, dtype=torch.float64)
    x = torch.arange(len(times) * 2, dtype=torch.float64).view(-1, 2)
    path = path if path is not None else RectifiedPath()
    return Regression(x, x + 2, x, t, x, path, "velocity")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_their_formulas(name):
    times = [0.1, 0.3, 0.5, 0.7, 0.95]
    expected = torch.tensor([4 * FORMULAS[name](t) for t in times], dtype=torch.float64)
    found = Weighted(L2(), name)(regression(times))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_snr_of_a_curved_path_is_its_squared_ratio():
    expected = 4 * math.tan(math.pi / 2 * 0.6) ** 2
    found = Weighted(L2(), "snr")(regression([0.6], CosinePath()))
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_both_ends_are_finite_and_within_the_limit(name):
    found = Weighted(L2(), name, limit=50.0)(regression([0.0, 1e-9, 1 - 1e-9, 1.0]))
    assert bool(found.isfinite().all())
    assert float(found.max()) <= 4 * 50


def test_a_function_of_time_and_path_is_a_weight():
    found = Weighted(L2(), lambda t, path: 3 * path.alpha(t))(regression([0.5, 1.0]))
    assert found.tolist() == [6.0, 12.0]


def test_wrong_weights():
    with pytest.raises(ValueError, match="unknown loss weight 'karas': did you mean 'karras'"):
        Weighted(L2(), "karas")
    with pytest.raises(ValueError, match="limit must be > 0, got 0"):
        Weighted(L2(), "snr", limit=0)
