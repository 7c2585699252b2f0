"""Tables of positions: layout, crops, several resolutions; noise levels as features."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.nets.positions import axis_table, crop_positions, noise_features, training_grid


def test_every_feature_is_the_formula():
    width, scale, offset = 8, 0.5, -1.0
    table = axis_table(6, width, scale=scale, offset=offset)
    for p in range(6):
        for i in range(width // 2):
            angle = (scale * p + offset) * 10000 ** (-i / (width / 2))
            assert float(table[p, i]) == pytest.approx(math.sin(angle), abs=1e-7)
            assert float(table[p, width // 2 + i]) == pytest.approx(math.cos(angle), abs=1e-7)


@pytest.mark.parametrize("rows, columns", [(6, 6), (4, 2), (3, 5), (1, 6)])
def test_a_crop_is_the_centre_of_the_full_grid(rows, columns):
    table = axis_table(6, 4)
    full = crop_positions(table, 6, 6).reshape(6, 6, 8)
    top, left = (6 - rows) // 2, (6 - columns) // 2
    expected = full[top : top + rows, left : left + columns].reshape(-1, 8)
    assert torch.equal(crop_positions(table, rows, columns), expected)


def test_the_first_half_of_the_features_tells_the_column():
    table = axis_table(5, 4)
    grid = crop_positions(table, 5, 5).reshape(5, 5, 8)
    for p in range(5):
        assert torch.equal(grid[:, p, :4], table[p].expand(5, 4))
        assert torch.equal(grid[p, :, 4:], table[p].expand(5, 4))


def test_a_larger_training_grid_is_interpolated_and_extended():
    # The paper: position (p - (h_max - s) / 2) * 256 / S, s = S / 16; here S = 512, h_max = 48.
    found = training_grid(48, 32)
    for p in range(48):
        position = found["position_scale"] * p + found["position_offset"]
        assert position == pytest.approx((p - (48 - 32) / 2) * 256 / 512)
    # The square of the target resolution spans 0 to 16, as the first resolution does.
    square = crop_positions(axis_table(48, 4, **_axis(found)), 32, 32).reshape(32, 32, 8)
    assert torch.equal(square[0, ::2, :4], axis_table(16, 4))
    assert training_grid(16, 16) == {"position_scale": 1.0, "position_offset": 0.0}


def _axis(found: dict[str, float]) -> dict[str, float]:
    return {"scale": found["position_scale"], "offset": found["position_offset"]}


def test_noise_features_are_cosines_then_sines_of_a_thousand_times_the_level():
    found = noise_features(torch.tensor([0.25], dtype=torch.float64), 6)[0]
    angles = [250 * 10000 ** (-i / 3) for i in range(3)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)  # frequencies are float32


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="even in number, got 3"):
        axis_table(4, 3)
    with pytest.raises(ValueError, match="positions for 4 patches a side, got 5x4"):
        crop_positions(axis_table(4, 4), 5, 4)
    with pytest.raises(ValueError, match="must hold the 32 patches"):
        training_grid(16, 32)
