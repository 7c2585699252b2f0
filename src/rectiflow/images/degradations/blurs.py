"""Blurs by centred kernels: Gaussian, motion, or any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from rectiflow.errors import positive, unknown
from rectiflow.images.degradations.linear import LinearOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

PADDINGS = ("circular", "reflect", "replicate", "zero")


def gaussian_kernel(size: int, std: float, *, official: bool = False) -> Float[Tensor, "k k"]:
    """A Gaussian sampled at pixel centres: symmetric, its sum 1.

    Args:
        size: side in pixels, odd so that it has a centre.
        std: standard deviation in pixels.
        official: the kernel of the code of FlowChef, which is half a pixel off centre; only to
            compare with its measurements.

    Raises:
        ValueError: an even size or a standard deviation that is not positive.

    Example:
        >>> gaussian_kernel(3, 1e-3)[1, 1]
        tensor(1.)
    """
    _odd("size", size)
    positive("std", std)
    grid = torch.arange(size, dtype=torch.float64) - size // 2
    if official:
        grid = grid - 0.5
    line = torch.softmax(-grid.square() / (2 * std**2), 0)
    return torch.outer(line, line).float()


def motion_kernel(length: int, angle: float = 0.0) -> Float[Tensor, "k k"]:
    """A straight line through the centre: symmetric about it, its sum 1.

    Args:
        length: pixels moved over while the picture was taken, odd.
        angle: direction in degrees, counter-clockwise from the right.

    Raises:
        ValueError: an even length.

    Example:
        >>> motion_kernel(3)[1]
        tensor([0.3333, 0.3333, 0.3333])
    """
    _odd("length", length)
    turn = math.radians(angle)
    # The middles of 32 equal pieces a pixel: no point falls on the border between two pixels.
    along = (torch.arange(32 * length, dtype=torch.float64) + 0.5) / 32 - length / 2
    rows = torch.round(-math.sin(turn) * along).long() + length // 2
    columns = torch.round(math.cos(turn) * along).long() + length // 2
    kernel = torch.zeros(length, length, dtype=torch.float64)
    kernel.index_put_((rows, columns), torch.ones_like(along), accumulate=True)
    return (kernel / kernel.sum()).float()


@dataclass(frozen=True, eq=False)
class Blur(LinearOperator):
    """Convolution of every channel with one centred kernel.

    Beyond the border the picture is mirrored by default; zeros there, as in the code of FlowChef,
    darken it. The norm is 1 (bound) for `circular` and `zero` and close to it otherwise.

    Args:
        kernel: odd sides, not negative; it is scaled to sum 1.
        padding: reflect, replicate, circular or zero.

    Raises:
        ValueError: a kernel without a centre, negative or empty; an unknown padding; images too
            small for the kernel.

    Example:
        >>> Blur(gaussian_kernel(3, 1.0)).A(torch.ones(1, 1, 4, 4)).mean().round(decimals=4)
        tensor(1.)
    """

    kernel: Tensor
    padding: str = "reflect"

    def __post_init__(self) -> None:
        kernel = self.kernel.double()
        if kernel.ndim != 2 or any(side % 2 == 0 for side in kernel.shape):
            raise ValueError(
                f"a kernel must be two-dimensional with odd sides, got shape {tuple(kernel.shape)}"
            )
        if not (bool((kernel >= 0).all()) and float(kernel.sum()) > 0):
            raise ValueError("a kernel must be finite, not negative and not zero everywhere")
        if self.padding not in PADDINGS:
            raise unknown("padding", self.padding, PADDINGS)
        object.__setattr__(self, "kernel", kernel / kernel.sum())

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        for side, reach in zip(image[1:], self._reach):
            # Mirrored, the border needs one pixel more than it reaches over.
            least = {"reflect": reach + 1, "circular": reach}.get(self.padding, 1)
            if side < least:
                raise ValueError(
                    f"images must be at least {least} pixels wide and high for a kernel of "
                    f"{self.kernel.shape[0]}x{self.kernel.shape[1]} with padding {self.padding!r}, "
                    f"got {image[1]}x{image[2]}"
                )
        return tuple(image)

    @property
    def _reach(self) -> tuple[int, int]:
        height, width = self.kernel.shape
        return height // 2, width // 2

    def _pad(self, images: Tensor) -> Tensor:
        rows, columns = self._reach
        mode = "constant" if self.padding == "zero" else self.padding
        return functional.pad(images, (columns, columns, rows, rows), mode=mode)

    def _weight(self, like: Tensor, *, flipped: bool = False) -> Tensor:
        kernel = self.kernel.flip(0, 1) if flipped else self.kernel
        return kernel.to(like).expand(like.shape[1], 1, -1, -1)

    def _apply(self, images: Tensor) -> Tensor:
        # Convolution proper: torch correlates, so the kernel is turned round.
        weight = self._weight(images, flipped=True)
        return functional.conv2d(self._pad(images), weight, groups=images.shape[1])

    def _adjoint(self, measured: Tensor) -> Tensor:
        self.shape(measured.shape[1:])
        weight = self._weight(measured, flipped=True)
        padded = functional.conv_transpose2d(measured, weight, groups=measured.shape[1])
        return self._unpad(padded, measured)

    def _unpad(self, padded: Tensor, like: Tensor) -> Tensor:
        """The adjoint of padding: what lies outside is added to the pixels it was copied from."""
        with torch.inference_mode(False), torch.enable_grad():
            inside = torch.zeros_like(like, requires_grad=True)
            pushed = padded.clone() if padded.is_inference() else padded
            (found,) = torch.autograd.grad(
                self._pad(inside), inside, pushed, create_graph=pushed.requires_grad
            )
        return found

    def norm(self, image: Sequence[int]) -> float:
        if self.padding in ("circular", "zero"):
            return 1.0
        # sqrt(largest row sum · largest column sum); rows sum to 1.
        columns = self.AT(torch.ones(1, 1, *image[1:], dtype=torch.float64))
        return float(columns.max()) ** 0.5


def _odd(name: str, value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be odd and positive, so that there is a centre, got {value}")
