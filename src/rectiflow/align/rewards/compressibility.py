"""How few bits JPEG would take, as a function with a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from rectiflow.align.rewards.pixels import unit_range

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# ITU-T T.81, tables K.1 and K.2: quantisation steps at quality 50, by frequency.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99), (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)  # fmt: skip


class Compressibility:
    """Minus the bits a pixel that a JPEG file would take, by a differentiable stand-in.

    Blocks of 8 by 8 pixels go through the cosine transform and are divided by the standard's
    quantisation steps; a coefficient of c steps counts `log2(1 + c²) / 2` bits, which is about its
    code length where it is large and vanishes smoothly where rounding would make it zero. Chroma is
    not subsampled, and what entropy coding saves further is left out: it ranks images as file
    sizes do (rank correlation above 0.9 on photographs) but is not the size. A negative weight in
    a mixture rewards detail instead.

    Args:
        quality: JPEG's quality, 1 to 100.

    Raises:
        ValueError: a quality outside 1 to 100; (when called) images of neither 1 nor 3 channels.

    Example:
        >>> flat, noisy = torch.zeros(1, 1, 8, 8), torch.randn(1, 1, 8, 8).clamp(-1, 1)
        >>> reward = Compressibility()
        >>> bool(reward(flat) > reward(noisy))
        True

    Source: the DCT proxy for arXiv 2310.03739's compressibility; quantisation by ITU-T T.81.
    """

    def __init__(self, quality: int = 75) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, got {quality}")
        self.quality = quality
        scale = 5000 / quality if quality < 50 else 200 - 2 * quality
        steps = torch.tensor([LUMINANCE, CHROMINANCE], dtype=torch.float64)
        self._steps = ((steps * scale + 50) / 100).floor().clamp(1, 255)
        position = torch.arange(8, dtype=torch.float64)
        wave = torch.cos(math.pi / 8 * (position + 0.5) * position[:, None])
        self._transform = wave * torch.where(position == 0, 0.125, 0.25).double().sqrt()[:, None]

    def __call__(self, images: Float[Tensor, "b c h w"], **condition: Any) -> Float[Tensor, " b"]:
        height, width = images.shape[-2:]
        planes = _planes(unit_range(images) * 255)
        planes = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
        blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
        transform = self._transform.to(planes)
        found = transform @ blocks @ transform.T
        steps = self._steps.to(planes)[[0, 1, 1][: planes.shape[1]]]
        relative = found / steps.view(1, -1, 1, 1, 8, 8)
        bits = 0.5 * torch.log2(1 + relative.square())
        return -bits.flatten(1).sum(1) / (height * width)


def _planes(pixels: Tensor) -> Tensor:
    """Brightness about zero, and for colours the two differences of JFIF."""
    if pixels.shape[1] == 1:
        return pixels - 128
    if pixels.shape[1] != 3:
        raise ValueError(
            f"compressibility takes images of 1 or 3 channels, got {pixels.shape[1]}: decode "
            "latents first"
        )
    red, green, blue = pixels.unbind(1)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([light - 128, 0.564 * (blue - light), 0.713 * (red - light)], 1)
