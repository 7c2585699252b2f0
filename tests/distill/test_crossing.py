"""Crossing risk: noises by the formula, low for smooth images, high in the plane."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import crossing_risk, generate_pairs
from rectiflow.flows import FlowModel, Pairs


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(count, size=8):
    """Images of random planes, of unit size: neighbours agree."""
    axis = torch.linspace(-1, 1, size)
    slopes = noise(count, 2, seed=1)
    return (slopes[:, :1, None] * axis[:, None] + slopes[:, 1:, None] * axis)[:, None]


def test_two_pairs_by_hand():
    # Two pairs meet each other: z' + (x' - x'') and z'' + (x'' - x').
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    needed = torch.stack([z[0] + x[0] - x[1], z[1] + x[1] - x[0]])
    found = crossing_risk(Pairs(z, x))
    assert found.crossing_norm == pytest.approx(needed.square().mean().sqrt().item())
    assert found.norm == pytest.approx(z.square().mean().sqrt().item())
    lag = [(v[0] * v[1] / v.square().mean()).item() for v in needed]
    assert found.crossing_correlation == pytest.approx(sum(lag) / 2)


def test_time_scales_the_difference():
    z, x = torch.zeros(2, 4), torch.stack([torch.ones(4), -torch.ones(4)])
    # t / (1 - t) * 2
    assert crossing_risk(Pairs(z, x), time=0.75).crossing_norm == pytest.approx(6.0)


def test_normal_noise_is_typical_when_targets_agree():
    found = crossing_risk(Pairs(noise(2000, 1, 8, 8), torch.zeros(2000, 1, 8, 8)))
    assert found.norm == pytest.approx(1, abs=0.01)
    assert found.crossing_norm == pytest.approx(found.norm)
    assert abs(found.correlation) < 0.01
    # Four standard deviations: the chi-squared tail is heavier than the normal one.
    assert found.risk > 0.99


def test_smooth_images_cannot_cross():
    found = crossing_risk(Pairs(noise(2000, 1, 16, 16), 2 * smooth(2000, 16)))
    assert found.crossing_norm > 1.5
    assert found.crossing_correlation > 0.3
    assert found.risk < 0.1
    certain = crossing_risk(Pairs(noise(2000, 1, 16, 16), 40 * smooth(2000, 16)))
    assert certain.risk < 0.01
    assert "one round of reflow should leave nearly straight paths" in certain.sentence


def test_points_in_the_plane_cross():
    found = crossing_risk(Pairs(noise(2000, 2), noise(2000, 2, seed=3)))
    assert found.risk > 0.5
    assert "lines do cross" in found.sentence


def test_stores_and_generators(tmp_path):
    model = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
    store = generate_pairs(model, tmp_path, 300, steps=1)
    first, second = (
        crossing_risk(store, count=100, generator=torch.Generator().manual_seed(0)) for _ in "ab"
    )
    assert first == second
    assert first.count == 100


def test_bad_input():
    pairs = Pairs(noise(4, 2), noise(4, 2))
    with pytest.raises(ValueError, match="time must be between 0 and 1, got 1"):
        crossing_risk(pairs, time=1.0)
    with pytest.raises(ValueError, match="two pairs or more can cross, got 1"):
        crossing_risk(Pairs(noise(1, 2), noise(1, 2)))
