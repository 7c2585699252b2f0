"""Masks: which pixels are kept, and which are to be filled in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rectiflow.images.degradations.linear import LinearOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """Keep some pixels and lose the others: `A x = keep x`.

    Args:
        keep: 1 where the image is known and 0 where it is to be filled in (values between weigh),
            of shape `(h, w)` or `(c, h, w)`.

    Raises:
        ValueError: values outside [0, 1], a mask that keeps nothing, or one that keeps everything.

    Example:
        >>> keep = torch.tensor([[1.0, 0.0]])
        >>> Mask(keep).A(torch.full((1, 1, 1, 2), 5.0)).tolist()
        [[[[5.0, 0.0]]]]
    """

    keep: Tensor

    def __post_init__(self) -> None:
        keep = torch.as_tensor(self.keep)
        if not keep.is_floating_point():
            keep = keep.float()
        if keep.ndim not in (2, 3):
            raise ValueError(f"a mask must be (h, w) or (c, h, w), got shape {tuple(keep.shape)}")
        low, high = float(keep.min()), float(keep.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"a mask must have values in [0, 1], got {low:g} to {high:g}")
        if high == 0:
            raise ValueError(
                "the mask keeps nothing (it is 0 everywhere): mark what is known with 1"
            )
        if low == 1:
            raise ValueError(
                "the mask keeps everything (it is 1 everywhere): mark what to fill in with 0"
            )
        object.__setattr__(self, "keep", keep if keep.ndim == 3 else keep[None])

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        channels, *sides = self.keep.shape
        if tuple(image[1:]) != tuple(sides) or channels not in (1, image[0]):
            raise ValueError(
                f"the mask is {sides[0]}x{sides[1]}"
                f"{f' with {channels} channels' if channels > 1 else ''} but the image is "
                f"{image[1]}x{image[2]} with {image[0]}: give a mask of the image's size"
            )
        return tuple(image)

    def _apply(self, images: Tensor) -> Tensor:
        return images * self.keep.to(images)

    def _adjoint(self, measured: Tensor) -> Tensor:
        self.shape(measured.shape[1:])
        return measured * self.keep.to(measured)

    def norm(self, image: Sequence[int]) -> float:
        return float(self.keep.max())

    def observed(self, measured: Float[Tensor, "b *measured"]) -> Float[Tensor, "b *measured"]:
        return measured * (self.keep > 0).to(measured)


def box_mask(
    image: Sequence[int], side: int | tuple[int, int], *, corner: tuple[int, int] | None = None
) -> Float[Tensor, "h w"]:
    """A mask that loses a box: 0 inside, 1 outside.

    Args:
        image: shape of the image, `(c, h, w)`.
        side: side of a square box, or its height and width, in pixels.
        corner: row and column of its upper left pixel; centred by default.

    Raises:
        ValueError: a box that is empty or does not lie inside the image.

    Example:
        >>> box_mask((1, 4, 4), 2).sum()
        tensor(12.)
    """
    height, width = image[-2:]
    rows, columns = (side, side) if isinstance(side, int) else side
    top, left = corner or ((height - rows) // 2, (width - columns) // 2)
    inside = top >= 0 and top + rows <= height and left >= 0 and left + columns <= width
    if rows < 1 or columns < 1 or not inside:
        raise ValueError(
            f"a box of {rows}x{columns} at row {top}, column {left} does not lie inside an image "
            f"of {height}x{width}"
        )
    keep = torch.ones(height, width)
    keep[top : top + rows, left : left + columns] = 0
    return keep


def read_mask(path: Path | str) -> Float[Tensor, "h w"]:
    """A mask from a picture: white is kept, black is filled in.

    Args:
        path: a picture of the image's size; colours become grey, half grey and lighter is kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no picture.
    """
    from rectiflow.training.data.pictures import read_picture

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mask {path}")
    try:
        grey = read_picture(path, channels=1)
    except ValueError as error:
        raise ValueError(f"the mask {path} cannot be read: {error}") from None
    return torch.from_numpy(grey[0] >= 128).float()
