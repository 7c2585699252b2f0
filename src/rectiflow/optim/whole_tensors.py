"""Steps of optimizers with parts that need whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.optim import buckets
from rectiflow.optim.parts import Part, Stretch, Whole, move

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.optim.buckets import Bucket


def step_whole(
    parts: Sequence[Part],
    bucket: Bucket,
    indices: Sequence[int],
    flats: dict[int, Tensor],
    numbers: dict[str, Any],
) -> None:
    """A step of some weights of a buffer; parts that do without whole tensors go over blocks.

    Args:
        parts: the chain.
        bucket: the buffer.
        indices: numbers of the weights.
        flats: their gradients, 1-D, by number.
        numbers: the settings of the step; parts may change them.
    """
    whole, places = _laid(bucket, indices, flats, numbers)
    _apply(parts, whole, places)
    for place in places:
        move(whole.cut(place), bucket.flat[whole.begin :][place])


def rectified_gradients(
    parts: Sequence[Part],
    bucket: Bucket,
    indices: Sequence[int],
    flats: dict[int, Tensor],
    numbers: dict[str, Any],
) -> list[Tensor]:
    """The gradients of some weights as rectifiers leave them, while weights and state stay.

    Args:
        parts: the rectifiers; otherwise as `step_whole`.

    Returns:
        a tensor a weight, shaped like it.
    """
    whole, places = _laid(bucket, indices, flats, numbers)
    for part in parts:
        for name in part.slots:
            whole.state[name] = whole.state[name].clone()
    _apply(parts, whole, places)
    found = []
    for index in indices:
        view, (start, stop) = bucket.views[index], whole.span(index)
        found.append(whole.gradient[start:stop].as_strided(view.shape, view.stride()))
    return found


def _laid(
    bucket: Bucket, indices: Sequence[int], flats: dict[int, Tensor], numbers: dict[str, Any]
) -> tuple[Whole, list[slice]]:
    """Some weights with all that belongs to them, and where their blocks are."""
    spans = [bucket.spans[index] for index in indices]
    begin, end = spans[0][0], spans[-1][1]
    if sum(bucket.sizes[index] for index in indices) == end - begin:
        rows = [flats[index] for index in indices]
        raw = (rows[0] if len(rows) == 1 else torch.cat(rows)).to(bucket.dtype)
    else:
        raw = torch.zeros(end - begin, dtype=bucket.dtype, device=bucket.device)
        for index, (start, stop) in zip(indices, spans):
            raw[start - begin : stop - begin] = flats[index]
    target = bucket.flat[begin:end]
    state = {name: buffer[begin:end] for name, buffer in bucket.state.items()}
    param = target.to(bucket.dtype)
    gradient = Stretch.of(param, raw, state, numbers).gradient
    whole = Whole(param, raw, gradient, gradient, gradient, state, numbers, bucket, indices, begin)
    if end - begin <= 2 * buckets.BLOCK:
        return whole, [slice(0, end - begin)]
    places = [
        slice(at - begin, min(at + buckets.BLOCK, stop) - begin)
        for start, stop in _runs(spans)
        for at in range(start, stop, buckets.BLOCK)
    ]
    return whole, places


def _apply(parts: Sequence[Part], whole: Whole, places: Sequence[slice]) -> None:
    for part in parts:
        if part.whole:
            part.apply(whole)
        elif len(places) == 1:
            _at_once(part, whole)
        else:
            _over_blocks(part, whole, places)


def _runs(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring spans joined."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    return found


def _at_once(part: Part, whole: Whole) -> None:
    """Apply a part to whole tensors that are little more than a block."""
    stretch = whole.cut(slice(0, len(whole.raw)))
    part.apply(stretch)
    whole.gradient, whole.momentum_gradient = stretch.gradient, stretch.momentum_gradient
    whole.direction = stretch.direction
    # A direction may be changed in place; gradients and state may not, which some rules hand on.
    kept = (whole.raw, whole.gradient, whole.momentum_gradient, *whole.state.values())
    shared = {tensor.data_ptr() for tensor in kept}
    if part.on == "direction" and whole.direction.data_ptr() in shared:
        whole.direction = whole.direction.clone()


def _over_blocks(part: Part, whole: Whole, places: Sequence[slice]) -> None:
    """Apply a part to blocks of whole tensors."""
    names = ("gradient", "momentum_gradient", "direction")
    made: dict[str, Tensor] = {}
    for place in places:
        stretch = whole.cut(place)
        given = {name: getattr(stretch, name) for name in names}
        part.apply(stretch)
        for name in names:
            value = getattr(stretch, name)
            if value is not given[name]:
                # What was there before, the raw gradient too, stays as it was.
                if name not in made:
                    made[name] = torch.empty_like(whole.raw)
                made[name][place] = value
    for name, value in made.items():
        setattr(whole, name, value)
