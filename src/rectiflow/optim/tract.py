"""TrAct: the weight gradient of a layer as if its outputs were the parameters.

A step on the outputs, `z - lr b dL/dz`, is realised by the weights that come closest to it in a
ridge regression on the layer's inputs. That is the plain gradient times the inverse of the inputs'
damped second moment: bright images no longer move a first layer more than dim ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rectiflow.errors import positive, unknown
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BRANCHES = ("auto", "tall", "wide")
GRAMS = ("local", "allreduce")
FORMS = ("backward", "graph")
# Numbers of unfolded images at a time: 64 MiB in float32.
CHUNK = 1 << 24


@dataclass(frozen=True)
class TrActSettings:
    """How a layer's weight gradient is rectified.

    Attributes:
        lam: damping, > 0; it counts against inputs of variance one. The paper's is 0.1, with 0.05
            for short and 0.2 for long trainings.
        relative: take lam in units of the inputs' mean square, for inputs that are not
            standardised or whose scale changes (noised images).
        gram: "local" takes the second moment of this process's rows, "allreduce" that of all
            processes, so that averaged gradients are those of the whole batch.
        form: "backward" is a backward pass of its own; "graph" builds the same gradient out of
            differentiable operations, at one more product forward, for `torch.func.vmap`.
    """

    lam: float = 0.1
    relative: bool = False
    gram: str = "local"
    form: str = "backward"

    def __post_init__(self) -> None:
        positive("lam", self.lam)
        if self.gram not in GRAMS:
            raise unknown("gram", self.gram, GRAMS)
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)


def tract_gradient(
    inputs: Float[Tensor, "*groups b n"],
    upstream: Float[Tensor, "*groups b m"],
    lam: float = 0.1,
    *,
    relative: bool = False,
    branch: str = "auto",
) -> Float[Tensor, "*groups m n"]:
    """The gradient of TrAct for the weights of `z = a W^T`, given a and dL/dz of a mean loss.

    `g^T a (a^T a / b + lam I)^-1`, or what is the same `g^T (a a^T / b + lam I)^-1 a`, whichever
    matrix is smaller. In float32 the damping is never below the rounding of that matrix (4 eps
    times its trace), so inputs far from unit variance are solved too, if with more damping. With
    a summed loss the result is b times too large, as the plain gradient is.

    Args:
        inputs: a, one row a sample (a token, a patch).
        upstream: dL/dz, same rows.
        lam: damping, > 0.
        relative: take lam in units of the mean square of a.
        branch: "tall" (n by n), "wide" (b by b) or "auto" (the smaller).

    Returns:
        the gradient, in float32 at least; NaN if the inputs are not finite.

    Raises:
        ValueError: lam that is not positive, or an unknown branch.

    Example:
        >>> a, g = torch.eye(2).repeat(4, 1) * 2**0.5, torch.ones(8, 1)
        >>> tract_gradient(a, g, 1.0) / (g.T @ a)
        tensor([[0.5000, 0.5000]])

    Source: arXiv 2410.23970, equations 3 to 5; the form of the wide branch is ours.
    """
    positive("lam", lam)
    if branch not in BRANCHES:
        raise unknown("branch", branch, BRANCHES)
    dtype = torch.promote_types(wide(inputs).dtype, wide(upstream).dtype)
    a, g = inputs.to(dtype), upstream.to(dtype)
    rows, width = a.shape[-2:]
    damping = TrActSettings(lam, relative)
    if branch == "wide" or (branch == "auto" and rows < width):
        return _solved(a @ a.mT / max(rows, 1), g, damping, width).mT @ a
    return _solved(a.mT @ a / max(rows, 1), a.mT @ g, damping, width).mT


def _solved(moment: Tensor, right: Tensor, settings: TrActSettings, width: int) -> Tensor:
    """`(moment + lam I)^-1 right`; both forms of the moment have the same trace."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    lam = trace.new_full((), settings.lam)
    if settings.relative:
        lam = lam * torch.where(trace > 0, trace / width, 1)
    lam = torch.maximum(lam, 4 * torch.finfo(trace.dtype).eps * trace)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    # No exception and no wait for the device; what cannot be factored is not finite.
    factor, failed = torch.linalg.cholesky_ex(moment + lam[..., None, None] * eye)
    solution = torch.cholesky_solve(right, factor)
    return torch.where((failed == 0)[..., None, None], solution, torch.nan)


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
    return _solved(moment, cross, settings, width).mT.reshape(shape)


def _mean(gram: Tensor, count: int, settings: TrActSettings) -> Tensor:
    """The second moment of a Gram matrix of `count` rows, of all processes where that is asked."""
    from torch import distributed

    alone = not (distributed.is_available() and distributed.is_initialized())
    if settings.gram == "local" or alone:
        return gram / max(count, 1)
    packed = torch.cat([gram.flatten(), gram.new_tensor([count])])
    distributed.all_reduce(packed)
    return packed[:-1].view_as(gram) / packed[-1].clamp(min=1)


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
        ctx.save_for_backward(x)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            found = _layer_gradient(x, upstream, ctx.shape, ctx.windows, ctx.settings)
        return upstream, found.to(ctx.dtype), None, None, None


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
            solved = _solved(a @ a.mT / max(rows, 1), a, settings, width)
        else:
            solved = _solved(_mean(a.mT @ a, rows, settings), a.mT, settings, width).mT
        filters = weight.flatten(1).unflatten(0, (windows.groups, -1)).to(a.dtype)
        moved = windows.outputs(solved @ filters.mT, z).to(z.dtype)
    # The value of the difference is zero, its gradient is not.
    return z + (moved - moved.detach())
