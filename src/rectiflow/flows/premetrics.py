"""How far a prediction is from its target: the loss inside flow matching, one number a sample.

A premetric is any callable that takes a `Regression` (what the network said, what it should have
said, where and when) and returns one loss a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rectiflow.errors import positive
from rectiflow.flows.paths import Path

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """One batch of network outputs beside what they are regressed on.

    Attributes:
        output: what the network predicted, `(b, ...)`.
        wanted: what it should have predicted, `(b, ...)`.
        x: the states it saw.
        t: the times it saw, `(b,)`.
        target: the data end of each pair.
        path: the path the states lie on.
        prediction: what `output` is (velocity, noise, data, score or v).
    """

    output: Tensor
    wanted: Tensor
    x: Tensor
    t: Tensor
    target: Tensor
    path: Path
    prediction: str

    @property
    def difference(self) -> Tensor:
        """Output minus wanted."""
        return self.output - self.wanted

    @property
    def estimate(self) -> Tensor:
        """The data that the output implies."""
        return self.path.convert(self.output, self.x, self.t, given=self.prediction, wanted="data")


class Premetric(Protocol):
    """Turns a regression into one loss a sample."""

    def __call__(self, regression: Regression) -> Tensor:
        """The loss of each sample, shape `(b,)`."""


@dataclass(frozen=True)
class L2:
    """The mean of squared differences over a sample's dimensions.

    Source: arXiv 2209.03003, equation 1 (mean over dimensions, as in the official configurations).
    """

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        return regression.difference.square().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """`(sqrt(|d|² + c²) - c) / n` over all n dimensions of a sample's difference vector d.

    Quadratic for small differences and linear for large ones, so a few hard samples weigh less
    than under `L2`. The gradient's norm stays below 1/n.

    Args:
        c: the norm at which the loss turns from quadratic to linear; None takes `0.00054 n`.

    Source: arXiv 2405.20320, section 4.2.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None:
            positive("c", self.c)

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        return vector_huber(regression.difference, self.c)


def vector_huber(difference: Float[Tensor, "b *dims"], c: float | None) -> Float[Tensor, " b"]:
    """`(sqrt(|d|² + c²) - c) / n` for the vector d of each sample; see `PseudoHuber`.

    Example:
        >>> vector_huber(torch.tensor([[0.0, 4.0]]), 3.0)
        tensor([1.])
    """
    flat = difference.flatten(1)
    dimensions = flat.shape[1]
    c = c if c is not None else 0.00054 * dimensions
    squared = flat.square().sum(1)
    # The difference of the two roots, written so that it does not cancel for small vectors.
    return squared / ((squared + c * c).sqrt() + c) / dimensions


@dataclass(frozen=True)
class FeatureL2:
    """The squared difference as a feature map sees it: `|Dh(x) d|²`, with `Dh` its Jacobian at x.

    Use it to transfer style between image domains: only what `features` sees has to match. The
    Jacobian is never formed; one forward-mode product gives `Dh(x) d` and its gradient in `d`.
    A feature map of low rank leaves the rest of the field free; `plain` adds that share of the
    ordinary L2 loss to tie it down.

    Args:
        features: a differentiable map of states `(b, ...)` to features `(b, ...)`.
        plain: weight of the L2 loss of the whole difference.

    Source: arXiv 2209.03003, section 5.3 (image-to-image translation); `plain` is ours.
    """

    features: Callable[[Tensor], Tensor]
    plain: float = 0.0

    def __post_init__(self) -> None:
        positive("plain", self.plain, zero=True)

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        difference = regression.difference
        seen = torch.func.jvp(self.features, (regression.x,), (difference,))[1]
        loss = seen.square().flatten(1).mean(1)
        if self.plain:
            loss = loss + self.plain * difference.square().flatten(1).mean(1)
        return loss
