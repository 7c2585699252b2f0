"""Where a patch lies and how noisy the image is, as sines and cosines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rectiflow import errors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAX_PERIOD = 10000.0
# Patches along a side at the resolution whose positions are 0, 1, 2, ... (256 pixels of latents).
UNIT_GRID = 16


def axis_table(
    size: int, width: int, *, scale: float = 1.0, offset: float = 0.0
) -> Float[Tensor, "size width"]:
    """Sines and cosines of the positions along one side of the largest grid.

    With n = width / 2 and w_i = 10000^(-i / n), row p holds sin(q w_i) for i = 0 ... n - 1, then
    cos(q w_i), where q = scale p + offset. The two-dimensional table of a grid is made of this
    one (see `crop_positions`), so only this one needs to be kept.

    Args:
        size: patches along the side.
        width: features per position, even.
        scale: distance of neighbouring positions; below 1 interpolates.
        offset: position of the first patch.

    Example:
        >>> axis_table(2, 2)[0].tolist()
        [0.0, 1.0]

    Source: the fixed 2-D embedding of arXiv 2403.03206, one axis of it.
    """
    errors.positive("size", size)
    if width < 2 or width % 2:
        raise ValueError(f"the features of a position must be even in number, got {width}")
    rates = MAX_PERIOD ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.outer(scale * torch.arange(size, dtype=torch.float64) + offset, rates)
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def crop_positions(
    table: Float[Tensor, "size half"], rows: int, columns: int
) -> Float[Tensor, "tokens width"]:
    """The embeddings of a grid of patches cut from the centre of the largest grid, row by row.

    The first half of the features tells the column, the second half the row. A crop of a table
    for many patches lets one network work on several resolutions and shapes.

    Raises:
        ValueError: more rows or columns than the table has.

    Example:
        >>> crop_positions(axis_table(4, 2), 1, 2).shape
        torch.Size([2, 4])

    Source: arXiv 2403.03206, section 5.3.2 (positional encodings for varying aspect ratios).
    """
    size = table.shape[0]
    if rows > size or columns > size:
        raise ValueError(f"the table has positions for {size} patches a side, got {rows}x{columns}")
    top, left = (size - rows) // 2, (size - columns) // 2
    across = table[left : left + columns].unsqueeze(0).expand(rows, -1, -1)
    down = table[top : top + rows].unsqueeze(1).expand(-1, columns, -1)
    return torch.cat([across, down], 2).flatten(0, 1)


def training_grid(size: int, trained: int) -> dict[str, float]:
    """The positions with which a larger grid is trained after a small one, as `MMDiT` arguments.

    The central `trained` patches of the largest grid get positions from 0 to 16, whatever their
    number, as at the first resolution; patches beyond them go on at the same distance. So the
    table is interpolated to the new resolution and extended for other aspect ratios.

    Args:
        size: patches along a side of the largest grid, of all shapes together.
        trained: patches along a side of the square of the target resolution.

    Returns:
        `position_scale` and `position_offset`.

    Example:
        >>> training_grid(size=64, trained=32)
        {'position_scale': 0.5, 'position_offset': -8.0}

    Source: arXiv 2403.03206, section 5.3.2: position (p - (h_max - s) / 2) 256 / S with S = 16 s.
    """
    errors.positive("trained", trained)
    if size < trained:
        raise ValueError(f"the largest grid must hold the {trained} patches trained on, got {size}")
    scale = UNIT_GRID / trained
    return {"position_scale": scale, "position_offset": -(size - trained) / 2 * scale}


def noise_features(level: Float[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """Cosines, then sines, of 1000 times the noise level at geometrically spaced frequencies.

    Phases are computed in float32 at least: rounded to half precision they would be off by
    radians. The frequencies, too, are made in float32, as those of the released weights were: the
    fastest phases reach 1000, where another rounding of a frequency shows in the fifth digit.

    Args:
        level: noise levels in [0, 1], 1 for pure noise.
        width: number of features, even.

    Example:
        >>> noise_features(torch.zeros(1), 4)
        tensor([[1., 1., 0., 0.]])

    Source: the timestep embedding of arXiv 2403.03206, whose time runs from 0 (data) to 1000.
    """
    wide = level.to(torch.promote_types(level.dtype, torch.float32))
    half = width // 2
    steps = torch.arange(half, device=level.device, dtype=torch.float32)
    rates = torch.exp(-math.log(MAX_PERIOD) * steps / half)
    phases = 1000 * wide[:, None] * rates
    return torch.cat([phases.cos(), phases.sin()], 1).to(level.dtype)
