"""The rows that a layer multiplies with its weight: samples, tokens or windows of images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

# Numbers of unfolded images at a time: 64 MiB in float32.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Windows:
    """Which rows a layer multiplies with its weight: none of its fields are set for linear ones.

    Attributes:
        kernel: size of a convolution's windows.
        stride: their distance.
        dilation: the distance of their elements.
        padding: as `functional.pad` takes it.
        mode: of padding, as `functional.pad` takes it.
        groups: groups of channels.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    mode: str = "constant"
    groups: int = 1

    def batched(self, values: Tensor) -> Tensor:
        """Inputs or outputs with one leading dimension."""
        if not self.kernel:
            return values.reshape(-1, values.shape[-1])
        return values if values.ndim == len(self.kernel) + 2 else values[None]

    def rows(self, x: Tensor) -> Tensor:
        """Batched inputs as `(groups, rows, n)`: one row for each place of each image."""
        if not self.kernel:
            return x[None]
        if any(self.padding):
            x = functional.pad(x, self.padding, mode=self.mode)
        for place, (size, stride, gap) in enumerate(zip(self.kernel, self.stride, self.dilation)):
            x = x.unfold(2 + place, gap * (size - 1) + 1, stride)[..., ::gap]
        count, channels = len(self.kernel), x.shape[1] // self.groups
        x = x.unflatten(1, (self.groups, channels))
        space, window = range(3, 3 + count), range(3 + count, 3 + 2 * count)
        x = x.permute(1, 0, *space, 2, *window)
        return x.flatten(2 + count).flatten(1, 1 + count)

    def columns(self, z: Tensor) -> Tensor:
        """Batched outputs as `(groups, rows, m)`, rows in the same order."""
        if not self.kernel:
            return z[None]
        z = z.unflatten(1, (self.groups, z.shape[1] // self.groups))
        return z.flatten(3).permute(1, 0, 3, 2).flatten(1, 2)

    def outputs(self, columns: Tensor, like: Tensor) -> Tensor:
        """The other way: columns in the shape of the layer's outputs."""
        if not self.kernel:
            return columns.reshape(like.shape)
        batch = self.batched(like)
        count = len(batch)
        return columns.unflatten(1, (count, -1)).permute(1, 0, 3, 2).reshape(like.shape)

    def chunks(self, x: Tensor, z: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Rows and columns of some images after another, so that few are unfolded at a time."""
        count = len(x)
        if self.kernel:
            each = x.shape[1] * math.prod(self.kernel) * math.prod(z.shape[2:])
            count = max(1, CHUNK // max(each, 1))
        for start in range(0, len(x), max(count, 1)):
            piece = slice(start, start + count)
            yield self.rows(x[piece]), self.columns(z[piece])
