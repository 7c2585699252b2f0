"""Bounds on the gradient of each pixel of an image, where a gradient enters what drew it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rectiflow.errors import positive, unknown
from rectiflow.optim.suppression import SUPPRESSIONS, order_of, pixel_norms, suppress

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def _quantile(sizes: Tensor, q: float) -> Tensor:
    """The least size with at least a share q of those above zero at or below it; 0 if none is."""
    some = sizes[sizes > 0]
    if not len(some):
        return sizes.new_zeros(())
    return torch.kthvalue(some, max(1, math.ceil(q * len(some)))).values


@dataclass(frozen=True)
class Clipped:
    """What one backward pass met.

    Attributes:
        fraction: share of the pixels that were longer than the threshold.
        threshold: the bound, in units of the unscaled gradient.
        largest: the longest gradient of a pixel, unscaled.
    """

    fraction: float
    threshold: float
    largest: float


class PixelwiseClip(nn.Module):
    """Hands images on as they are, and bounds each pixel's gradient on its way back.

    Put it between what draws an image (a texture, a field, the image itself) and the frozen
    network that judges it: `loss = judge(clip(draw(scene)))`. Some encoders' backward passes give
    a few pixels enormous gradients; those no longer outshout the rest. Only the branch that goes
    through it is clipped; where the judge has no such pixels it costs a little.

    Args:
        threshold: the bound c, in units of the unscaled gradient, or "quantile:0.95": the
            quantile of the pixels with a gradient, anew in each pass.
        suppression: see `suppress`; "none" only looks.
        norm: see `pixelwise_clip`.
        channel_dim: which dimension holds the channels.
        scale: called in each backward pass for the factor on the loss, such as the `get_scale`
            of a gradient scaler.

    Raises:
        ValueError: a negative threshold, a quantile outside (0, 1), unknown names.

    Example:
        >>> clip = PixelwiseClip(0.1)
        >>> image = torch.zeros(1, 3, 2, 2, requires_grad=True)
        >>> (5 * clip(image)[..., 0, 0]).sum().backward()
        >>> image.grad.amax(), clip.last.fraction
        (tensor(0.1000), 0.25)

    Source: arXiv 2310.12474.
    """

    def __init__(
        self,
        threshold: float | str = 0.1,
        *,
        suppression: str = "pixel",
        norm: str = "linf",
        channel_dim: int = 1,
        scale: Callable[[], float | Tensor] | None = None,
    ) -> None:
        super().__init__()
        if suppression not in SUPPRESSIONS:
            raise unknown("suppression", suppression, SUPPRESSIONS)
        order_of(norm)
        self.threshold = threshold
        self._quantile = _parsed(threshold)
        self.suppression, self.norm = suppression, norm
        self.channel_dim, self.scale = channel_dim, scale
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._watch: list[Tensor] | None = None

    @torch.compiler.disable
    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not x.requires_grad:
            return x
        # A tensor of its own: other uses of x do not meet the hook.
        branch = x.view_as(x)
        branch.register_hook(self._clip)
        return branch

    @property
    def last(self) -> Clipped | None:
        """What the last backward pass met, or None before the first."""
        if self._last is None:
            return None
        fraction, threshold, largest = (float(value) for value in self._last)
        return Clipped(fraction, threshold, largest)

    def get_extra_state(self) -> dict[str, float | str]:
        return {"threshold": self.threshold}

    def set_extra_state(self, state: dict[str, float | str]) -> None:
        self.threshold = state["threshold"]
        self._quantile = _parsed(self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, suppression={self.suppression}, norm={self.norm}"

    def _clip(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            # A second derivative that is zero comes as nothing.
            return None
        with torch.no_grad():
            sizes = pixel_norms(grad, channel_dim=self.channel_dim, norm=self.norm)
            scale = self.scale() if self.scale is not None else 1.0
            factor = torch.as_tensor(scale, dtype=sizes.dtype, device=sizes.device)
            if self._quantile is None:
                bound = factor * float(self.threshold)
            else:
                bound = _quantile(sizes, self._quantile)
            self._last = ((sizes > bound).float().mean(), bound / factor, sizes.amax() / factor)
            if self._watch is not None:
                self._watch.append((sizes / factor).flatten())
                return grad
        return suppress(grad, bound, self.suppression, channel_dim=self.channel_dim, norm=self.norm)


def _parsed(threshold: float | str) -> float | None:
    """The quantile of a threshold that names one."""
    if not isinstance(threshold, str):
        positive("threshold", threshold, zero=True)
        return None
    word, _, number = threshold.partition(":")
    try:
        quantile = float(number)
    except ValueError:
        quantile = math.nan
    if word != "quantile" or not 0 < quantile < 1:
        raise ValueError(
            f"threshold must be a number or 'quantile:Q' with Q in (0, 1), got {threshold!r}"
        )
    return quantile


def calibrate_threshold(
    clip: PixelwiseClip, backward: Callable[[], object], *, steps: int = 20, q: float = 0.9
) -> float:
    """Let a clip watch some backward passes, and set its threshold to a quantile of what it saw.

    Nothing is suppressed meanwhile. Pixels without gradient (background) do not count.

    Args:
        clip: the clip; its `threshold`, and with it its state dict, becomes what is returned.
        backward: makes one backward pass through it, without a step of the optimizer.
        steps: how many passes.
        q: the quantile of the pixels' gradients, in (0, 1).

    Returns:
        the threshold.

    Raises:
        ValueError: steps or q out of range, or no pass with a gradient went through the clip.

    Example:
        >>> clip, image = PixelwiseClip(), torch.zeros(1, 1, 1, 10, requires_grad=True)
        >>> calibrate_threshold(
        ...     clip, lambda: (clip(image) * torch.arange(1.0, 11.0)).sum().backward(), steps=1)
        9.0
    """
    positive("steps", steps)
    if not 0 < q < 1:
        raise ValueError(f"q must be in (0, 1), got {q}")
    clip._watch = []
    try:
        for _ in range(steps):
            backward()
        seen = torch.cat(clip._watch) if clip._watch else torch.zeros(0)
    finally:
        clip._watch = None
    found = float(_quantile(seen, q))
    if not found > 0:
        raise ValueError("no gradient went through the clip: put it between the image and the loss")
    clip.threshold, clip._quantile = found, None
    return found
