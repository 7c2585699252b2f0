"""Fewer pixels and fewer colours: average pooling and grey."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn import functional

from rectiflow.images.degradations.linear import LinearOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Downscale(LinearOperator):
    """Means over squares of `factor` by `factor` pixels; the norm is `1 / factor`.

    Args:
        factor: how many times smaller; it must divide both sides.

    Raises:
        ValueError: a factor below 2, or images whose sides it does not divide.

    Example:
        >>> import torch
        >>> Downscale(2).A(torch.arange(4.0).reshape(1, 1, 2, 2)).item()
        1.5
    """

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"factor must be >= 2, got {self.factor}")

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = image
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images must have sides in multiples of {self.factor} to be downscaled by it, "
                f"got {height}x{width}: crop them or choose another factor"
            )
        return channels, height // self.factor, width // self.factor

    def _apply(self, images: Tensor) -> Tensor:
        return functional.avg_pool2d(images, self.factor)

    def _adjoint(self, measured: Tensor) -> Tensor:
        wide = measured.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)
        return wide / self.factor**2

    def norm(self, image: Sequence[int]) -> float:
        return 1 / self.factor


@dataclass(frozen=True)
class Grey(LinearOperator):
    """The luma of colour images: one channel, `sum_c weights_c x_c`; the norm is that of `weights`.

    Args:
        weights: one weight a channel; those of ITU-R 601 by default.

    Raises:
        ValueError: images with another number of channels.

    Example:
        >>> import torch
        >>> Grey().A(torch.ones(1, 3, 1, 1)).item()
        1.0
    """

    weights: tuple[float, ...] = (0.299, 0.587, 0.114)

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        if image[0] != len(self.weights):
            raise ValueError(
                f"images must have {len(self.weights)} channels to be made grey, got {image[0]}"
            )
        return 1, *image[1:]

    def _apply(self, images: Tensor) -> Tensor:
        return (images * self._column(images)).sum(1, keepdim=True)

    def _adjoint(self, measured: Tensor) -> Tensor:
        return measured * self._column(measured)

    def norm(self, image: Sequence[int]) -> float:
        return math.hypot(*self.weights)

    def _column(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.weights).reshape(1, -1, 1, 1)
