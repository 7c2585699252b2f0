"""What JPEG does to blocks of 8 by 8 numbers: cosine transforms, and how they are rounded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SIDE = 8
# ITU-T T.81, tables K.1 and K.2: steps at quality 50, by frequency.
BRIGHTNESS = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
COLOUR = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99), (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)  # fmt: skip


def rounding_steps(quality: int, channels: int) -> Float[Tensor, "channels 1 1 8 8"]:
    """What coefficients are rounded to multiples of, for brightness and then two of colour.

    Args:
        quality: 1 (coarse) to 100 (fine), as in the reference encoder.
        channels: 1 or 3.

    Raises:
        ValueError: a quality outside 1 to 100.

    Example:
        >>> rounding_steps(50, 1)[0, 0, 0, 0, :3]
        tensor([16., 11., 10.], dtype=torch.float64)

    Source: ITU-T T.81, annex K.1; scaling of the tables as in libjpeg.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1 to 100, got {quality}")
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([BRIGHTNESS, COLOUR, COLOUR][:channels], dtype=torch.float64)
    return ((tables * scale + 50) / 100).floor().clamp(1, 255)[:, None, None]


def cosine_matrix() -> Float[Tensor, "8 8"]:
    """The orthonormal cosine transform of eight numbers, one row a frequency."""
    n = torch.arange(SIDE, dtype=torch.float64)
    rows = torch.cos(math.pi / SIDE * (n + 0.5) * n[:, None]) * 0.5
    rows[0] *= math.sqrt(0.5)
    return rows


def to_blocks(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c rows columns 8 8"]:
    """The cosine transform of every block; sides that are no multiple of 8 repeat their border.

    Example:
        >>> to_blocks(torch.ones(1, 1, 9, 8))[0, 0, :, 0, 0, 0].round()
        tensor([8., 8.])
    """
    cosines = cosine_matrix().to(images)
    extra = (0, -images.shape[-1] % SIDE, 0, -images.shape[-2] % SIDE)
    padded = functional.pad(images, extra, mode="replicate")
    return cosines @ padded.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE) @ cosines.T


def from_blocks(
    blocks: Float[Tensor, "b c rows columns 8 8"], height: int, width: int
) -> Float[Tensor, "b c height width"]:
    """The images of a size that have these transforms.

    Example:
        >>> image = torch.randn(1, 1, 9, 5)
        >>> torch.allclose(from_blocks(to_blocks(image), 9, 5), image, atol=1e-5)
        True
    """
    cosines = cosine_matrix().to(blocks)
    whole = (cosines.T @ blocks @ cosines).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole[..., :height, :width]
