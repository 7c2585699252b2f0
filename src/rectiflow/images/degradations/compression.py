"""JPEG-like compression: a degradation that is not linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.images.degradations.linear import Degradation
from rectiflow.vectors.jpeg import from_blocks, rounding_steps, to_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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
        rounding_steps(self.quality, 1)

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        if image[0] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels for JPEG, got {image[0]}")
        return tuple(image)

    def _apply(self, images: Tensor) -> Tensor:
        _, channels, height, width = images.shape
        colour = _to_luma(images) if channels == 3 else images
        found = to_blocks(colour * 127.5)
        steps = rounding_steps(self.quality, channels).to(found)
        rounded = torch.round(found / steps) * steps
        whole = from_blocks(found + (rounded - found).detach(), height, width) / 127.5
        return _from_luma(whole) if channels == 3 else whole


def _to_luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, (blue - luma) / 1.772, (red - luma) / 1.402], 1)


def _from_luma(images: Tensor) -> Tensor:
    luma, blueness, redness = images.unbind(1)
    red, blue = luma + 1.402 * redness, luma + 1.772 * blueness
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue], 1)
