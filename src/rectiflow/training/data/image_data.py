"""Images in memory or on disk with their labels and captions, one record for every source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from rectiflow.errors import unknown

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Indices: TypeAlias = Int[Tensor, " b"] | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size, with the labels and captions that belong to them.

    Pixels stay in the form they are stored in and become floats batch by batch, so a folder
    far larger than memory can be trained on: `images` may be a read-only memory map. A `uint8`
    value u stands for u / 127.5 - 1; `float32` values are in [-1, 1] already.

    Args:
        name: where the images came from, as in `digits` or `folder:cats`.
        images: array of shape (n, c, h, w), `uint8` or `float32`.
        labels: array of shape (n,), `int64`, in 0..len(classes)-1, or None.
        classes: one name per class, () without labels.
        captions: one text per image, or None.
        skipped: (file, reason) for everything in the source that could not be used, in
            whichever split it would have been.

    Raises:
        ValueError: if the shapes, types or lengths do not fit each other.

    Example:
        >>> grey = np.zeros((4, 1, 8, 8), np.uint8)
        >>> data = ImageData("grey", grey, np.array([0, 1, 0, 1]), ("a", "b"), None)
        >>> len(data), data.shape, data.batch([0, 3]).unique().tolist()
        (4, (1, 8, 8), [-1.0])
        >>> data.only("b").condition([0])
        {'label': tensor([0])}
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    captions: tuple[str, ...] | None
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        images, count = self.images, len(self.images)
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"images of {self.name} must be (n, c, h, w) uint8 or float32, "
                f"got {images.dtype} of shape {images.shape}"
            )
        if self.captions is not None and len(self.captions) != count:
            raise ValueError(f"{self.name} has {count} images and {len(self.captions)} captions")
        if self.labels is None:
            return
        if self.labels.shape != (count,) or self.labels.dtype != np.int64:
            raise ValueError(
                f"labels of {self.name} must be int64 of shape ({count},), "
                f"got {self.labels.dtype} of shape {self.labels.shape}"
            )
        if count and not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            raise ValueError(
                f"labels of {self.name} run from {self.labels.min()} to {self.labels.max()}, "
                f"outside its {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def slug(self) -> str:
        """The name with everything but letters, digits and dots turned into hyphens."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-.") or "data"

    def batch(self, indices: Indices) -> Float[Tensor, "b c h w"]:
        """The images at `indices` as new float32 values in [-1, 1], on the CPU."""
        # ascontiguousarray: a memory map's fancy index keeps the map's type
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[_positions(indices)]))
        if pixels.dtype == torch.uint8:
            return pixels.float().div_(127.5).sub_(1)
        return pixels

    def condition(self, indices: Indices) -> dict[str, Tensor]:
        """`{"label": int64 of shape (b,)}`, or nothing for data without labels."""
        if self.labels is None:
            return {}
        return {"label": torch.from_numpy(self.labels[_positions(indices)])}

    def subset(self, indices: Indices) -> ImageData:
        """The images at `indices`, in that order.

        A run of neighbours (`range(100)`) is a view of the same memory; any other choice is
        copied into memory.
        """
        rows = _positions(indices)
        if len(rows) and rows[0] >= 0 and np.array_equal(rows, rows[0] + np.arange(len(rows))):
            chosen: slice | np.ndarray = slice(int(rows[0]), int(rows[-1]) + 1)
            self.images[rows[-1]]  # a slice would be cut short where an index is an error
        else:
            chosen = rows
        return replace(
            self,
            images=np.asarray(self.images[chosen]),
            labels=None if self.labels is None else self.labels[chosen],
            captions=None if self.captions is None else tuple(self.captions[i] for i in rows),
        )

    def only(self, *classes: str | int) -> ImageData:
        """The images of some classes, labelled 0..k-1 in the order the classes are given.

        Args:
            classes: names or indices of classes.

        Raises:
            ValueError: for data without labels, no class, a class twice or an unknown one.
        """
        if self.labels is None:
            raise ValueError(f"{self.name} has no labels to choose classes by")
        wanted = [self._class_index(one) for one in classes]
        if not wanted or len(set(wanted)) < len(wanted):
            raise ValueError(f"classes must be one or more different ones, got {classes}")
        relabel = np.full(len(self.classes), -1, np.int64)
        relabel[wanted] = np.arange(len(wanted))
        labels = relabel[self.labels]
        chosen = self.subset(np.flatnonzero(labels >= 0))
        return replace(
            chosen,
            labels=labels[labels >= 0],
            classes=tuple(self.classes[i] for i in wanted),
        )

    def _class_index(self, one: str | int) -> int:
        if isinstance(one, str):
            if one not in self.classes:
                raise unknown("class", one, self.classes)
            return self.classes.index(one)
        if not 0 <= one < len(self.classes):
            raise ValueError(f"class index must be 0..{len(self.classes) - 1}, got {one}")
        return one


def _positions(indices: Indices) -> np.ndarray:
    """Indices of any kind as a flat integer array; a mask of booleans becomes its positions."""
    rows = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
    if rows.dtype == bool:
        return np.flatnonzero(rows)
    return rows.astype(np.int64, casting="same_kind") if rows.size else np.zeros(0, np.int64)
