"""Inner products and splits of many tensors laid one after the other in one 1-D buffer.

Optimizers keep a model's weights and gradients in flat buffers; a `Segments` says where each tensor
lies, so that a rule per tensor costs a handful of calls for the whole model. Nothing is written to
its inputs, nothing waits for a device, and every function is differentiable. Half-precision inputs
are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.vectors.batchwise import Split, wide

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each tensor lies in a flat buffer, precomputed for fast per-tensor sums.

    The buffer is cut into blocks of equal size. A block inside one segment is summed as a row of a
    matrix; the few elements of blocks that straddle a border, and the tail, are added one by one.
    Make one with `Segments.of(sizes)` and keep it.

    Args:
        sizes: number of elements of each tensor, in order.
        block: elements per block.
        block_segment: segment of each block; `len(sizes)` for a block that straddles a border.
        ragged: positions of the elements outside whole blocks.
        ragged_segment: the segment of each of those.
    """

    sizes: tuple[int, ...]
    block: int
    block_segment: Int[Tensor, "blocks"]
    ragged: Int[Tensor, "r"]
    ragged_segment: Int[Tensor, "r"]

    @classmethod
    def of(cls, sizes: Sequence[int], *, device: torch.device | str | None = None) -> Segments:
        """Plan the segments of a buffer.

        Args:
            sizes: number of elements of each tensor, in order.
            device: where the buffer lives.

        Returns:
            the plan.

        Raises:
            ValueError: no segment, or a negative size.

        Example:
            >>> segment_norm(torch.tensor([3., 4., 2.]), Segments.of([2, 1]))
            tensor([5., 2.])
        """
        if not sizes or min(sizes) < 0:
            raise ValueError(f"sizes must be a non-empty list of counts >= 0, got {list(sizes)}")
        total = sum(sizes)
        # n/B blocks plus about B ragged elements per border is least at B = sqrt(n / k). Measured
        # on one core with 148 segments, ms per inner product of 5.4 M / 36 k elements: this 16 /
        # 0.23, index_add 159 / 0.72, segment_reduce 53 / 0.16, one dot per segment 10 / 1.96,
        # differences of a float64 cumulative sum 388 / 0.30 (and cancellation); a bare a*b costs
        # 13 / 0.02. Error against float64, relative to the norms: 1e-8 (index_add 6e-8).
        block = 2 ** round(math.log2(max(total / len(sizes), 1)) / 2)
        block = min(max(block, 16), 256)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        whole = total // block
        rows = owner[: whole * block].view(whole, block)
        inside = rows[:, 0] == rows[:, -1]
        straddling = (~inside).repeat_interleave(block).nonzero().squeeze(1)
        ragged = torch.cat([straddling, torch.arange(whole * block, total)])
        block_segment = torch.where(inside, rows[:, 0], len(sizes))
        return cls(
            tuple(sizes),
            block,
            block_segment.to(device),
            ragged.to(device),
            owner[ragged].to(device),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def sum(self, values: Float[Tensor, "n"]) -> Float[Tensor, "k"]:
        """Sum of each segment of a float32 or float64 buffer, accumulated in float64."""
        whole = len(self.block_segment) * self.block
        # Metal has no float64.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        rows = values[:whole].view(-1, self.block).sum(1).to(dtype)
        total = rows.new_zeros(len(self) + 1).index_add(0, self.block_segment, rows)
        total = total.index_add(0, self.ragged_segment, values[self.ragged].to(dtype))
        return total[: len(self)].to(values.dtype)

    def expand(self, values: Float[Tensor, "k"]) -> Float[Tensor, "n"]:
        """A buffer that repeats each segment's value over the segment."""
        per_block = torch.cat([values, values.new_zeros(1)])[self.block_segment]
        whole = len(per_block) * self.block
        # Blocks: 5 ms for 5.4 M elements; gathering by an index of that length takes 32 to 120.
        buffer = values.new_empty(sum(self.sizes))
        buffer[:whole].view(-1, self.block).copy_(per_block[:, None].expand(-1, self.block))
        return buffer.index_copy_(0, self.ragged, values[self.ragged_segment])


def segment_inner(
    a: Float[Tensor, "n"], b: Float[Tensor, "n"], segments: Segments
) -> Float[Tensor, "k"]:
    """Inner product of each segment of `a` with the one of `b`: `inner` on a flat buffer.

    Args:
        a: flat buffer.
        b: flat buffer of the same length.
        segments: where each tensor lies.

    Returns:
        one number per segment; float32 for half-precision inputs.

    Raises:
        ValueError: a buffer is not 1-D with as many elements as the segments hold.

    Example:
        >>> segment_inner(torch.ones(3), torch.tensor([1., 2., 4.]), Segments.of([2, 1]))
        tensor([3., 4.])
    """
    _check_flat(a, segments)
    _check_flat(b, segments)
    return segments.sum(wide(a) * wide(b))


def segment_norm(a: Float[Tensor, "n"], segments: Segments) -> Float[Tensor, "k"]:
    """Euclidean norm of each segment: `norm` on a flat buffer.

    Squares are formed as they are: entries below about 1e-19 (float32) count as zero.

    Args:
        a: flat buffer.
        segments: where each tensor lies.

    Returns:
        one number per segment; float32 for half-precision inputs.

    Raises:
        ValueError: the buffer is not 1-D with as many elements as the segments hold.

    Example:
        >>> segment_norm(torch.tensor([3., 4., -2.]), Segments.of([2, 1]))
        tensor([5., 2.])
    """
    square = segment_inner(a, a, segments)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def segment_split_parallel(
    vector: Float[Tensor, "n"], reference: Float[Tensor, "n"], segments: Segments
) -> Split:
    """Split each segment along and across its reference: `split_parallel` on a flat buffer.

    Args:
        vector: flat buffer of what is split.
        reference: flat buffer of the directions, same length.
        segments: where each tensor lies.

    Returns:
        both parts as flat buffers in the dtype of `vector`.

    Raises:
        ValueError: a buffer is not 1-D with as many elements as the segments hold.

    Example:
        >>> split = segment_split_parallel(
        ...     torch.tensor([3., 4., 2.]), torch.tensor([0., 2., 1.]), Segments.of([2, 1]))
        >>> split.orthogonal
        tensor([3., 0., 0.])
    """
    square = segment_inner(reference, reference, segments)
    share = segment_inner(vector, reference, segments) / torch.where(square > 0, square, 1)
    parallel = segments.expand(share) * wide(reference)
    return Split(parallel.to(vector.dtype), (wide(vector) - parallel).to(vector.dtype))


def _check_flat(a: Tensor, segments: Segments) -> None:
    total = sum(segments.sizes)
    if a.shape != (total,):
        raise ValueError(f"the segments hold {total} elements, got a buffer of {tuple(a.shape)}")
