"""Ways to hold the gradient of an image down, the bound on each pixel first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import unknown
from rectiflow.vectors.batchwise import length_of, wide
from rectiflow.vectors.clips import clip_norm, clip_pixels, clip_value

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ORDERS = {"linf": math.inf, "l2": 2}
SUPPRESSIONS = (
    "pixel", "value", "global", "global-norm", "soft", "pixel-soft", "tanh", "drop", "none",
)  # fmt: skip


def pixelwise_clip(
    grad: Float[Tensor, "..."],
    c: float | Tensor,
    *,
    channel_dim: int = 1,
    norm: str = "linf",
) -> Float[Tensor, "..."]:
    """Shorten the gradient of each pixel that is longer than c, keeping its direction.

    `v min(1, c / ||v||)` for the channel vector v of every pixel. Pixels within the bound are
    unchanged bit for bit. NaN and infinity are not repaired: a gradient scaler has to see them.

    Args:
        grad: the gradient of images.
        c: largest norm of a pixel's gradient, >= 0. It depends on how the loss is scaled: the
            paper's 0.1 is for a loss summed over latents.
        channel_dim: which dimension holds the channels; 1 for (b, c, h, w), -1 for (h, w, c).
        norm: "linf" (the largest channel: the released code) or "l2" (the paper).

    Returns:
        the clipped gradient.

    Raises:
        ValueError: a negative c, an unknown norm, a dimension that the gradient does not have.

    Example:
        >>> pixelwise_clip(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), 1.0, norm="l2").flatten()
        tensor([0.6000, 0.8000])

    Source: arXiv 2310.12474, section on pixel-wise gradient clipping.
    """
    return clip_pixels(_channels(grad, channel_dim), c, order=order_of(norm)).movedim(
        1, channel_dim
    )


def suppress(
    grad: Float[Tensor, "..."],
    c: float | Tensor,
    kind: str = "pixel",
    *,
    channel_dim: int = 1,
    norm: str = "linf",
) -> Float[Tensor, "..."]:
    """One of the ways to hold an image's gradient down that the paper compares.

    All of them commute with scaling gradient and c together, and take zeros to zeros.

    Args:
        grad: the gradient of images.
        c: the bound; an infinite one leaves the gradient as it is.
        kind: "pixel" (`pixelwise_clip`), "value" (each number into [-c, c]), "global" (everything
            rescaled so that the largest number is c), "global-norm" (everything shortened to norm
            c), "soft" (`c g / (|g| + c)` for each number), "pixel-soft" (the same by a pixel's
            norm), "tanh" (`c tanh(g / c)`), "drop" (pixels above c become zero) or "none".
        channel_dim: which dimension holds the channels.
        norm: how long a pixel's gradient is, see `pixelwise_clip`.

    Returns:
        the new gradient.

    Raises:
        ValueError: as `pixelwise_clip`, and an unknown kind.

    Example:
        >>> suppress(torch.tensor([[3.0, -1.0]]), 1.0, "soft")
        tensor([[ 0.7500, -0.5000]])

    Source: arXiv 2310.12474, `grad_suppress_type` of the released code. There "global" divides by
        zero where all is zero, and the sigmoid in the place of "tanh" saturates under a scaler.
    """
    if kind not in SUPPRESSIONS:
        raise unknown("suppression", kind, SUPPRESSIONS)
    if kind == "none":
        return grad
    if kind == "pixel":
        return pixelwise_clip(grad, c, channel_dim=channel_dim, norm=norm)
    if kind == "value":
        return clip_value(grad, c, start=0)
    if kind == "global-norm":
        return clip_norm(grad, c, start=0)
    given = torch.as_tensor(c, dtype=wide(grad).dtype, device=grad.device)
    bound = torch.where(given.isinf(), 1, given)
    full = wide(grad)
    if kind == "global":
        largest = full.abs().amax()
        found = full * (bound / torch.where(largest > 0, largest, 1))
    elif kind == "tanh":
        safe = torch.where(bound > 0, bound, 1)
        found = bound * torch.tanh(full / safe)
    elif kind == "drop":
        size = pixel_norms(grad, channel_dim=channel_dim, norm=norm).unsqueeze(channel_dim)
        found = torch.where(size > bound, 0, full)
    else:
        size = full.abs()
        if kind == "pixel-soft":
            size = pixel_norms(grad, channel_dim=channel_dim, norm=norm).unsqueeze(channel_dim)
        found = full * (bound / torch.where(size + bound > 0, size + bound, 1))
    return torch.where(given.isinf(), full, found).to(grad.dtype)


def pixel_norms(
    grad: Float[Tensor, "..."], *, channel_dim: int = 1, norm: str = "linf"
) -> Float[Tensor, "..."]:
    """The length of each pixel's gradient: the tensor without its channels, in float32 at least.

    Args:
        grad: the gradient of images.
        channel_dim: which dimension holds the channels.
        norm: see `pixelwise_clip`.

    Raises:
        ValueError: an unknown norm, a dimension that the gradient does not have.

    Example:
        >>> pixel_norms(torch.tensor([3.0, -4.0]).view(1, 2, 1, 1))
        tensor([[[4.]]])
    """
    full = wide(_channels(grad, channel_dim))
    if order_of(norm) == 2:
        return length_of(full, (1,)).squeeze(1)
    return full.abs().amax(1)


def _channels(grad: Tensor, channel_dim: int) -> Tensor:
    """The gradient with its channels second."""
    if grad.ndim < 2 or not -grad.ndim <= channel_dim < grad.ndim:
        raise ValueError(
            f"channel_dim {channel_dim} of a {grad.ndim}-D gradient: images have two dimensions "
            "or more, and the channels are one of them"
        )
    return grad.movedim(channel_dim, 1)


def order_of(norm: str) -> float:
    """The order of a norm by name."""
    if norm not in ORDERS:
        raise unknown("norm", norm, ORDERS)
    return ORDERS[norm]
