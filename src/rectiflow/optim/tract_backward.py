"""The backward pass of a layer trained by TrAct."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rectiflow.optim.tract import TrActSettings, solved, tract_gradient
from rectiflow.optim.tract_windows import Windows
from rectiflow.vectors.batchwise import wide


def _layer_gradient(
    x: Tensor, upstream: Tensor, shape: torch.Size, windows: Windows, settings: TrActSettings
) -> Tensor:
    """The rectified gradient of a layer's weight."""
    x, upstream = windows.batched(x), windows.batched(upstream)
    groups, width = windows.groups, math.prod(shape[1:])
    count = len(x) * math.prod(upstream.shape[2:])
    if count < width and settings.gram == "local":
        a, g = windows.rows(x), windows.columns(upstream)
        return tract_gradient(a, g, settings.lam, relative=settings.relative).reshape(shape)
    dtype = torch.promote_types(wide(x).dtype, wide(upstream).dtype)
    gram = x.new_zeros((groups, width, width), dtype=dtype)
    cross = x.new_zeros((groups, width, shape[0] // groups), dtype=dtype)
    for rows, columns in windows.chunks(x, upstream):
        a, g = rows.to(dtype), columns.to(dtype)
        gram += a.mT @ a
        cross += a.mT @ g
    moment = _mean(gram, count, settings)
    return solved(moment, cross, settings, width).mT.reshape(shape)


def _mean(gram: Tensor, count: int, settings: TrActSettings) -> Tensor:
    """The second moment of a Gram matrix of `count` rows, of all processes where that is asked."""
    from torch import distributed

    alone = not (distributed.is_available() and distributed.is_initialized())
    if settings.gram == "local" or alone:
        return gram / max(count, 1)
    packed = torch.cat([gram.flatten(), gram.new_tensor([count])])
    distributed.all_reduce(packed)
    return packed[:-1].view_as(gram) / packed[-1].clamp(min=1)


class _Once(torch.autograd.Function):
    """Gradients as they are, which depend on the weight but cannot be differentiated."""

    @staticmethod
    def forward(upstream: Tensor, found: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return upstream.view_as(upstream), found.view_as(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "a gradient of TrAct has no derivative: make the layer plain with remove_tract, or "
            "for a while with plain_gradients, to look at second derivatives"
        )


class _Rectified(torch.autograd.Function):
    """A layer's outputs as they are; backward, its weight gets the rectified gradient."""

    @staticmethod
    def forward(
        z: Tensor, weight: Tensor, x: Tensor, windows: Windows, settings: TrActSettings
    ) -> Tensor:
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, weight, x, ctx.windows, ctx.settings = inputs
        # The same tensor, not a view of it: activations may work in place on what comes out.
        ctx.mark_dirty(z)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = _layer_gradient(x, upstream, weight.shape, ctx.windows, ctx.settings)
        found = found.to(weight.dtype)
        if torch.is_grad_enabled():
            # Without the weight in it, the graph of this gradient would end here in silence.
            upstream, found = _Once.apply(upstream, found, weight)
        return upstream, found, None, None, None


def rectified(
    z: Tensor, weight: Tensor, x: Tensor, windows: Windows, settings: TrActSettings
) -> Tensor:
    """Outputs that do not depend on the weight, with its rectified gradient added to their graph.

    Args:
        z: outputs of a layer with detached weight; taken over (changed in place).
        weight: the weight.
        x: the inputs.
        windows: which rows of the inputs the weight multiplies.
        settings: how the gradient is rectified.
    """
    x = x.detach()
    if settings.form == "backward":
        return _Rectified.apply(z, weight, x, windows, settings)
    with torch.autocast(x.device.type, enabled=False):
        a = wide(windows.rows(windows.batched(x)))
        rows, width = a.shape[-2:]
        if rows < width and settings.gram == "local":
            whitened = solved(a @ a.mT / max(rows, 1), a, settings, width)
        else:
            whitened = solved(_mean(a.mT @ a, rows, settings), a.mT, settings, width).mT
        filters = weight.flatten(1).unflatten(0, (windows.groups, -1)).to(a.dtype)
        moved = windows.outputs(whitened @ filters.mT, z).to(z.dtype)
    # The value of the difference is zero, its gradient is not.
    return z + (moved - moved.detach())
