"""What several optimizers would do at the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.optim.chained import chain
from rectiflow.optim.coordinate_clipping import ClipCoordinates
from rectiflow.optim.directions import Adam, Momentum
from rectiflow.optim.split_sign import SplitSign

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Builder = Callable[[list[Any]], torch.optim.Optimizer]


class Shadows:
    """Optimizers that see all gradients of a training, but whose steps are not taken.

    One real training moves the weights; each shadow keeps its own state (momentum, second moments)
    and says where it would go from here. So their directions can be compared at the same point, by
    `directional_sharpness`. Call `follow` after each backward pass, before the real step.

    Args:
        params: the weights of the real training.
        optimizers: name to a function that builds the optimizer of given weights.

    Raises:
        ValueError: no optimizers.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
        >>> shadows = Shadows([weight], {
        ...     "descent": lambda p: torch.optim.SGD(p, lr=1.0),
        ...     "sign": lambda p: chain(SplitSign(1.0, 1.0, 0.0, 0.0))(p, lr=1.0)})
        >>> (weight.square().sum() / 2).backward()
        >>> shadows.follow()
        >>> {name: v.tolist() for name, v in shadows.directions.items()}
        {'descent': [2.0, -3.0], 'sign': [1.0, -1.0]}

    Source: arXiv 2306.00204, section 3: pseudo-updates.
    """

    def __init__(self, params: Iterable[Any], optimizers: Mapping[str, Builder]) -> None:
        if not optimizers:
            raise ValueError("shadows need one optimizer or more, got none")
        self.params = list(params)
        # A step is the difference of two weights: in float64 it loses nothing to their size.
        self._copies = {
            name: [torch.nn.Parameter(p.detach().double().clone()) for p in self.params]
            for name in optimizers
        }
        self._optimizers = {name: build(self._copies[name]) for name, build in optimizers.items()}
        self.directions: dict[str, Float[Tensor, " n"]] = {}

    @torch.no_grad()
    def follow(self, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Let every shadow step from the present weights, and note the direction.

        Args:
            gradients: one a weight; what `p.grad` holds by default.
        """
        found = [p.grad for p in self.params] if gradients is None else gradients
        for name, copies in self._copies.items():
            for copy, p, gradient in zip(copies, self.params, found):
                copy.copy_(p)
                copy.grad = None if gradient is None else gradient.detach().double().clone()
            before = torch.cat([copy.detach().reshape(-1) for copy in copies])
            self._optimizers[name].step()
            after = torch.cat([copy.detach().reshape(-1) for copy in copies])
            self.directions[name] = before - after


def paper_shadows() -> dict[str, Builder]:
    """The optimizers of the paper's comparison: momentum, sign and Adam, plain and clipped.

    "SGD" is the direction of its momentum buffer, a mean of gradients over about ten steps; the raw
    gradient is sharper still.

    Example:
        >>> list(paper_shadows())
        ['SGD', 'SGD, clipped', 'sign', 'Adam', 'Adam, clipped']

    Source: arXiv 2306.00204, section 5; fractions of its code.
    """
    mean = Momentum(0.9, 0.9)
    rules = {
        "SGD": chain(mean),
        "SGD, clipped": chain(mean, ClipCoordinates(0.1)),
        "sign": chain(SplitSign(1.0, 1.0)),
        "Adam": chain(Adam()),
        "Adam, clipped": chain(Adam(), ClipCoordinates(0.5, where="momentum")),
    }
    return {name: _at_rate_one(rule) for name, rule in rules.items()}


def _at_rate_one(rule: Callable[..., torch.optim.Optimizer]) -> Builder:
    return lambda params: rule(params, lr=1.0)
