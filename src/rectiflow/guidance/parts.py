"""Parts of a picture that add up to it, each made after a condition of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rectiflow.guidance.view import View

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part(View):
    """A linear filter of what the network says; the network itself sees the whole picture.

    Fine detail after one condition and coarse form after another, colour after one and grey
    after another: with `combine="sum"` the answers are filtered and added. Nothing is lost if the
    filters add up to the identity, for which `Rest` gives the other half. Parts are not
    orthogonal and so only for sums.

    Args:
        filter: any linear map of `(b, c, h, w)` to itself, such as the `A` of a blur of
            `images.degradations`, or `lambda x: 0.3 * x`.

    Example:
        >>> import torch
        >>> mean = Part(lambda x: x.mean((-2, -1), keepdim=True).expand_as(x))
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> mean.inverse(x).flatten(), Rest(mean).inverse(x).flatten()
        (tensor([2., 2.]), tensor([-1.,  1.]))

    Source: arXiv 2404.11615 (factorized diffusion).
    """

    filter: Callable[[Tensor], Tensor]

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return x

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return self.filter(x)


@dataclass(frozen=True, eq=False)
class Rest(View):
    """What parts leave of a picture.

    Args:
        parts: the parts that are taken by others.
    """

    parts: tuple[Part, ...]

    def __init__(self, *parts: Part) -> None:
        object.__setattr__(self, "parts", parts)

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return x

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return x - sum(part.filter(x) for part in self.parts)
