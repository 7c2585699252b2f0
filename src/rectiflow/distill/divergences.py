"""f-divergences between data and generator, as weights on one gradient.

`D_f(p || q) = E_q[f(p / q)]` for a convex f. Its gradient with respect to a generator of q is that
of the reverse Kullback-Leibler divergence with each sample weighted by `h(r) = f''(r) r²` of the
density ratio `r = p / q`, so a divergence is a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import unknown

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Function = Callable[..., "Tensor"]
CHECKED = 401
"""Ratios, spread evenly in their logarithm, at which a function of the user's is looked at."""


@dataclass(frozen=True)
class Divergence:
    """A divergence by its convex function and by its weight.

    Weights that grow with r push the generator where data are missed (covering), weights that fall
    make it give up modes. Only ratios between weights matter: they are divided by their mean.

    Attributes:
        name: what it is called.
        f: the convex function of the ratio `r = p / q` of data to generator.
        weight: `h(r) = f''(r) r²`.
        constant: whether the weight is the same for all ratios, so that none need be known.

    Example:
        >>> DIVERGENCES["js"].weight(torch.tensor([0.25, 1.0, 4.0]))
        tensor([0.2000, 0.5000, 0.8000])

    Source: arXiv 2502.15681, theorem 1 and table 1.
    """

    name: str
    f: Function
    weight: Function
    constant: bool = False


DIVERGENCES: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("rkl", lambda r: -r.log(), torch.ones_like, constant=True),
        Divergence(
            "sf", lambda r: (r + 1) * ((r + 1).log() - (2 * r).log()), lambda r: 1 / (r + 1)
        ),
        Divergence(
            "js", lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (r + 1)
        ),
        Divergence("sh", lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),
        Divergence("kl", lambda r: r * r.log(), lambda r: r),
        Divergence("jf", lambda r: (r - 1) * r.log(), lambda r: r + 1),
        Divergence("neyman", lambda r: 1 / r - 2 + r, lambda r: 2 / r),
        Divergence("pearson", lambda r: (r - 1).square(), lambda r: 2 * r.square()),
    )
}


def resolve(
    divergence: str | Divergence | Function, *, low: float = 0.1, high: float = 20.0
) -> Divergence:
    """The divergence of a name, of a function f(r), or as it is.

    A function of your own needs nothing but torch operations that can be differentiated twice; its
    weight comes by automatic differentiation. It is tried on all ratios that may occur, and must
    be convex there: a negative weight would drive the generator away from the data.

    Args:
        divergence: rkl, sf, js, sh, kl, jf, neyman, pearson, a `Divergence`, or f itself.
        low: smallest ratio that may occur.
        high: largest.

    Raises:
        ValueError: an unknown name, or a function that is not convex, not finite, or linear.

    Example:
        >>> squared = resolve(lambda r: (r - 1) ** 2)
        >>> squared.weight(torch.tensor([1.0, 2.0]))
        tensor([2., 8.])
    """
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            raise unknown("divergence", divergence, DIVERGENCES)
        return DIVERGENCES[divergence]
    name = getattr(divergence, "__name__", type(divergence).__name__)
    ratios = torch.logspace(
        torch.tensor(low).log10().item(),
        torch.tensor(high).log10().item(),
        CHECKED,
        dtype=torch.float64,
    )
    weights = curvature_weight(divergence, ratios)
    span = f"on ratios from {low:g} to {high:g}"
    if not bool(weights.isfinite().all()):
        bad = ratios[~weights.isfinite()][0].item()
        raise ValueError(
            f"divergence {name!r} is not finite {span} (its second derivative at {bad:.3g} is "
            "not): give an f that is"
        )
    # Rounding may make the second derivative of a linear stretch slightly negative.
    slack = 1e-9 * float(weights.abs().max())
    if bool((weights < -slack).any()):
        bad = ratios[weights < -slack][0].item()
        raise ValueError(
            f"divergence {name!r} is not convex {span} (its second derivative at {bad:.3g} is "
            "negative): give a convex f"
        )
    if not bool((weights > 0).any()):
        raise ValueError(f"divergence {name!r} is linear {span}, so it has no gradient: bend it")
    return Divergence(name, divergence, lambda r: curvature_weight(divergence, r).clamp(min=0))


def curvature_weight(f: Function, ratio: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """`f''(r) r²` by automatic differentiation in float64, in the dtype of the ratios.

    Example:
        >>> curvature_weight(lambda r: r * r.log(), torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """
    with torch.enable_grad():
        r = ratio.detach().double().requires_grad_(True)
        value, second = f(r).sum(), torch.zeros_like(r)
        first = (
            torch.autograd.grad(value, r, create_graph=True, allow_unused=True)[0]
            if value.requires_grad
            else None
        )
        if first is not None and first.requires_grad:
            (found,) = torch.autograd.grad(first.sum(), r, allow_unused=True)
            second = second if found is None else found
    return (second * r.detach().square()).to(ratio.dtype)
