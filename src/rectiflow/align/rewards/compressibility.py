"""How few bits JPEG would take, as a function with a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rectiflow.align.rewards.pixels import unit_range
from rectiflow.vectors.jpeg import rounding_steps, to_blocks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


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
        self.quality, self._steps = quality, rounding_steps(quality, 3)

    def __call__(self, images: Float[Tensor, "b c h w"], **condition: Any) -> Float[Tensor, " b"]:
        height, width = images.shape[-2:]
        planes = _planes(unit_range(images) * 255)
        relative = to_blocks(planes) / self._steps[: planes.shape[1]].to(planes)
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
