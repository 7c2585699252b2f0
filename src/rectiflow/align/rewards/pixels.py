"""Rewards of pixel values, and the one place where their range is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FARTHEST = 8.0
"""Images in [-1, 1] that overshoot stay far below this; bytes do not."""
WIDE = 0.9
"""Values of images in [0, 1] span more than this; bright images in [-1, 1] hardly do."""


def unit_range(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images in [-1, 1] as images in [0, 1], clipped, with the gradient of the unclipped ones.

    Judges made for photographs want [0, 1]. Mapping twice squeezes the contrast into [0.5, 1]
    without an error, so images that fill [0, 1] already, or bytes, are refused. A plain clip
    would leave saturated pixels without gradient for ever.

    Args:
        images: about in [-1, 1].

    Raises:
        ValueError: images that are not on the scale of [-1, 1].

    Example:
        >>> import torch
        >>> unit_range(torch.tensor([-1.0, 0.0, 3.0]).view(1, 1, 1, 3)).flatten().tolist()
        [0.0, 0.5, 1.0]
    """
    low, high = (float(v) for v in images.detach().aminmax())
    if max(-low, high) > FARTHEST:
        raise ValueError(
            f"rewards take images in [-1, 1], got values from {low:g} to {high:g}: rescale them, "
            "or add a range penalty if training drove them there"
        )
    if low >= 0 and high <= 1 and high - low > WIDE:
        raise ValueError(
            f"rewards take images in [-1, 1], got values from {low:g} to {high:g}, which looks "
            "like [0, 1]: pass 2 x - 1"
        )
    unit = images / 2 + 0.5
    return unit + (unit.clamp(0, 1) - unit).detach()


@dataclass(frozen=True)
class Brightness:
    """The mean pixel, or how near it is to a target.

    Without a target it has no maximum: add a range penalty.

    Args:
        target: the wanted mean in [-1, 1]; the reward is then `-|mean - target|`.

    Example:
        >>> import torch
        >>> Brightness(0.0)(torch.full((1, 1, 2, 2), -0.25))
        tensor([-0.2500])
    """

    target: float | None = None

    def __call__(self, images: Float[Tensor, "b *dims"], **condition: Any) -> Float[Tensor, " b"]:
        mean = images.flatten(1).mean(1)
        return mean if self.target is None else -(mean - self.target).abs()
