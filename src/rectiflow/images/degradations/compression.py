"""JPEG-like compression: a degradation that is not linear."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from rectiflow.images.degradations.linear import Degradation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# ITU-T T.81, tables K.1 (brightness) and K.2 (colour), row by row.
LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    *(99,) * 32,
)  # fmt: skip


@dataclass(frozen=True)
class JPEG(Degradation):
    """What JPEG does to a picture: 8x8 cosine transforms rounded to multiples of a table.

    Unlike a file, colour keeps its full resolution and values are not cut to bytes. Rounding has
    no derivative; the gradient passes straight through it, so that of the whole map is that of
    the identity on images (up to the border where sides are no multiples of 8).

    Args:
        quality: 1 (coarse) to 100 (fine), as in the reference encoder.

    Raises:
        ValueError: a quality outside 1 to 100, or images without 1 or 3 channels.

    Example:
        >>> flat = torch.full((1, 1, 8, 8), 0.5)
        >>> (JPEG(50).A(flat) - flat).abs().max() < 0.01
        tensor(True)

    Source: ITU-T T.81, annexes A.3 and K.1; scaling of the tables as in libjpeg; straight-through
        gradient: arXiv 1308.3432.
    """

    quality: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1 to 100, got {self.quality}")

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        if image[0] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels for JPEG, got {image[0]}")
        return tuple(image)

    def _apply(self, images: Tensor) -> Tensor:
        _, channels, height, width = images.shape
        colour = _to_luma(images) if channels == 3 else images
        extra = (0, -width % 8, 0, -height % 8)
        padded = functional.pad(colour * 127.5, extra, mode="replicate")
        cosines = _cosines().to(padded)
        blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)
        found = cosines @ blocks @ cosines.T
        steps = self._steps(channels).to(padded)
        rounded = torch.round(found / steps) * steps
        found = found + (rounded - found).detach()
        blocks = cosines.T @ found @ cosines
        whole = blocks.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)
        whole = whole[..., :height, :width] / 127.5
        return _from_luma(whole) if channels == 3 else whole

    def _steps(self, channels: int) -> Tensor:
        """The multiples, `(channels, 1, 1, 8, 8)`."""
        scale = 5000 / self.quality if self.quality < 50 else 200 - 2 * self.quality
        tables = [LUMA] if channels == 1 else [LUMA, CHROMA, CHROMA]
        values = torch.tensor(tables, dtype=torch.float64).reshape(-1, 1, 1, 8, 8)
        return ((values * scale + 50) / 100).floor().clamp(1, 255)


@functools.cache
def _cosines() -> Tensor:
    """The orthonormal cosine transform of eight numbers, one row a frequency."""
    n = torch.arange(8, dtype=torch.float64)
    rows = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None]) * 0.5
    rows[0] *= math.sqrt(0.5)
    return rows


def _to_luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, (blue - luma) / 1.772, (red - luma) / 1.402], 1)


def _from_luma(images: Tensor) -> Tensor:
    luma, blueness, redness = images.unbind(1)
    red, blue = luma + 1.402 * redness, luma + 1.772 * blueness
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue], 1)
