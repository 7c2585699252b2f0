"""Weights of one kind in one flat buffer, and blocks of it that fit the cache.

One call over a flat buffer does what a call for each tensor would, without the cost of calls. The
weights themselves become views of the buffer; autograd, `state_dict` and everyone who holds them
see the same tensors as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch._utils import _flatten_dense_tensors

if TYPE_CHECKING:
    from torch import Tensor

# Elements of a block: few enough that it stays in the caches of a core, with its temporaries, and
# enough that calls cost little beside the arithmetic.
BLOCK = 131_072


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a step is computed and its state kept: float32 at least."""
    return dtype if dtype.itemsize >= 4 else torch.float32


@dataclass(frozen=True)
class Block:
    """A stretch of a buffer: within one tensor, or several whole small ones.

    Attributes:
        start: its first element in the buffer.
        stop: one past its last.
        first: number of its first tensor.
        last: number of its last.
        offset: where it begins in a tensor that it does not hold as a whole.
    """

    start: int
    stop: int
    first: int
    last: int
    offset: int


class Bucket:
    """The weights of one group on one device and of one dtype, laid into a buffer.

    Args:
        params: the weights, in the order of the group.

    Attributes:
        flat: the buffer, of the weights' dtype.
        views: it, cut into tensors of the weights' shapes and strides.
        state: one buffer a slot, in float32 at least.
        steps: steps that each weight has taken, a tensor for checkpoints.
        counts: the same as numbers.
        loose: the weights could not be moved (shared memory, overlapping tensors): they are copied
            in and out at each step.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sizes = [p.numel() for p in self.params]
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        self.spans = list(pairwise(ends))
        first = self.params[0]
        self.dtype, self.device = working_dtype(first.dtype), first.device
        self.loose = any(map(_immovable, self.params)) or _overlapping(self.params)
        self.flat = torch.empty(ends[-1], dtype=first.dtype, device=first.device)
        self.views = [_view(self.flat, p, a) for p, (a, _) in zip(self.params, self.spans)]
        for p, view in zip(self.params, self.views):
            view.copy_(p.detach())
            if not self.loose:
                p.data = view
        self.in_order = [view.is_contiguous() for view in self.views]
        self.pointers = [p.data_ptr() for p in self.params]
        self.state: dict[str, Tensor] = {}
        self.steps = torch.zeros(len(self.params), dtype=torch.float32)
        self.counts = [0] * len(self.params)
        self._gathered: Tensor | None = None
        self._blocks: dict[tuple[int, ...], list[Block]] = {}
        self._cuts: dict[Block, tuple[Tensor, dict[str, Tensor]]] = {}
        self._units: dict[tuple[int, ...], list[list[int]]] = {}

    def add_slot(self, name: str) -> None:
        """A new buffer of zeros."""
        self.state[name] = self.state_like()
        self._cuts.clear()

    def state_like(self) -> Tensor:
        """Zeros, one a weight, in the working precision."""
        return torch.zeros(len(self.flat), dtype=self.dtype, device=self.device)

    def gathered(self, flats: Sequence[Tensor]) -> Tensor:
        """All flat tensors one after the other, in a buffer that is kept for the next time."""
        kind = flats[0].dtype
        if self._gathered is None or self._gathered.dtype != kind:
            self._gathered = torch.empty(len(self.flat), dtype=kind, device=self.device)
        return torch.cat(list(flats), out=self._gathered)

    def slot_view(self, name: str, index: int) -> Tensor:
        """A slot's part for one weight, shaped like it."""
        return _view(self.state[name], self.views[index], self.spans[index][0])

    @property
    def intact(self) -> bool:
        """Whether all weights are still where they were put."""
        return [p.data_ptr() for p in self.params] == self.pointers

    def runs(self, present: Sequence[bool]) -> Iterator[tuple[int, list[int]]]:
        """Weights with a gradient, by the steps they have taken: the count and their numbers."""
        if all(present) and self.counts.count(self.counts[0]) == len(self.counts):
            yield self.counts[0], list(range(len(self.counts)))
            return
        by_count: dict[int, list[int]] = {}
        for index, (here, count) in enumerate(zip(present, self.counts)):
            if here:
                by_count.setdefault(count, []).append(index)
        yield from by_count.items()

    def count(self, indices: Sequence[int], steps: int) -> None:
        """Keep how many steps the weights of these numbers have taken."""
        if len(indices) == len(self.counts):
            self.counts = [steps] * len(self.counts)
            self.steps.fill_(steps)
            return
        for index in indices:
            self.counts[index] = steps
        self.steps[list(indices)] = float(steps)

    def blocks(self, indices: Sequence[int]) -> list[Block]:
        """The blocks that hold the weights of these numbers."""
        key = tuple(indices)
        if key not in self._blocks:
            # Which weights have gradients changes rarely; a few such sets are worth keeping.
            if len(self._blocks) > 8:
                self._blocks.clear()
                self._cuts.clear()
            self._blocks[key] = list(_cut(self.sizes, self.spans, key))
        return self._blocks[key]

    def units(self, indices: Sequence[int]) -> list[list[int]]:
        """Large weights alone, the others as runs of neighbours that fit a block."""
        key = tuple(indices)
        if key not in self._units:
            if len(self._units) > 8:
                self._units.clear()
            found: list[list[int]] = []
            held = BLOCK
            for index in key:
                held += self.sizes[index]
                if held > BLOCK or found[-1][-1] != index - 1:
                    found.append([])
                    held = self.sizes[index]
                found[-1].append(index)
            self._units[key] = found
        return self._units[key]

    def cut(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights of a block, and its part of every slot; cut once, since they never move."""
        if block not in self._cuts:
            place = slice(block.start, block.stop)
            state = {name: buffer[place] for name, buffer in self.state.items()}
            self._cuts[block] = self.flat[place], state
        return self._cuts[block]

    def piece(self, tensors: Sequence[Tensor], block: Block) -> Tensor:
        """The part that lies in a block of tensors shaped like the weights, flat."""
        if block.first == block.last:
            length = block.stop - block.start
            flat = self.flatten(block.first, tensors[block.first])
            return flat[block.offset : block.offset + length]
        first, after = block.first, block.last + 1
        if all(self.in_order[first:after]):
            # One call; tensors that are not contiguous are copied to be.
            return _flatten_dense_tensors(tensors[first:after])
        return torch.cat([self.flatten(index, tensors[index]) for index in range(first, after)])

    def flatten(self, index: int, tensor: Tensor) -> Tensor:
        """A tensor shaped like a weight as 1-D, in the order in which the weight is laid."""
        if self.in_order[index] and tensor.is_contiguous():
            return tensor.view(-1)
        view = self.views[index]
        if tensor.stride() != view.stride() or not _dense(tensor):
            tensor = torch.empty_strided(
                view.shape, view.stride(), dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
        return tensor.as_strided((tensor.numel(),), (1,))

    def gather(self) -> None:
        """Copy weights that could not be moved into the buffer."""
        if self.loose:
            for p, view in zip(self.params, self.views):
                view.copy_(p.detach())

    def scatter(self, indices: Sequence[int]) -> None:
        """Copy them back."""
        if self.loose:
            for index in indices:
                self.params[index].data.copy_(self.views[index])


def _cut(
    sizes: Sequence[int], spans: Sequence[tuple[int, int]], indices: Sequence[int]
) -> Iterator[Block]:
    """Blocks of large tensors on their own, and of small neighbours together."""
    begin, held = -1, 0
    for place, index in enumerate(indices):
        start, stop = spans[index]
        if sizes[index] >= BLOCK // 2:
            for offset in range(0, sizes[index], BLOCK):
                yield Block(start + offset, min(start + offset + BLOCK, stop), index, index, offset)
            continue
        if begin < 0:
            begin, held = index, 0
        held += sizes[index]
        after = indices[place + 1] if place + 1 < len(indices) else None
        joins = (
            after == index + 1 and sizes[after] < BLOCK // 2 and held + sizes[after] <= BLOCK
            if after is not None
            else False
        )
        if not joins:
            if held:
                yield Block(spans[begin][0], stop, begin, index, 0)
            begin = -1


def _view(flat: Tensor, like: Tensor, start: int) -> Tensor:
    """A stretch of a buffer with the shape of a tensor, and its strides where they are dense."""
    strides = like.stride() if _dense(like) else _contiguous(like.shape)
    return flat.as_strided(like.shape, strides, flat.storage_offset() + start)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps and overlaps, its first dimension outermost.

    So do contiguous and channels-last ones; the rows of the first dimension are then in one piece.
    """
    if tensor.is_contiguous():
        return True
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape)):
        if length == 1:
            continue
        if stride != size:
            return False
        size *= length
    first = max((s for s, n in zip(tensor.stride(), tensor.shape) if n > 1), default=0)
    return tensor.shape[0] == 1 or tensor.stride(0) == first


def _immovable(param: Any) -> bool:
    """Whether a weight's memory is somebody else's."""
    plain = type(param.data) is torch.Tensor
    return not plain or (param.device.type == "cpu" and param.is_shared())


def _overlapping(params: Sequence[Tensor]) -> bool:
    """Whether two weights, or parts of one, share memory."""
    ends = []
    for p in params:
        if not p.numel():
            continue
        length = 1 + sum((size - 1) * abs(stride) for size, stride in zip(p.shape, p.stride()))
        if length < p.numel():
            return True
        ends.append((p.data_ptr(), p.data_ptr() + length * p.element_size()))
    ends.sort()
    return any(stop > start for (_, stop), (start, _) in pairwise(ends))
