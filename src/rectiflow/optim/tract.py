"""TrAct: the weight gradient of a layer as if its outputs were the parameters.

A step on the outputs, `z - lr b dL/dz`, is realised by the weights that come closest to it in a
ridge regression on the layer's inputs. That is the plain gradient times the inverse of the inputs'
damped second moment: bright images no longer move a first layer more than dim ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import positive, unknown
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BRANCHES = ("auto", "tall", "wide")
GRAMS = ("local", "allreduce")
FORMS = ("backward", "graph")


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
        return solved(a @ a.mT / max(rows, 1), g, damping, width).mT @ a
    return solved(a.mT @ a / max(rows, 1), a.mT @ g, damping, width).mT


def solved(moment: Tensor, right: Tensor, settings: TrActSettings, width: int) -> Tensor:
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
