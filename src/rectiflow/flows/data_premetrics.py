"""Premetrics that look at the data or the noise a prediction implies, whatever was predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import positive
from rectiflow.flows.premetrics import Regression

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class DataPseudoHuber:
    """The mean over dimensions of `sqrt(d² + c²) - c`, with d the error of the implied data.

    Taken element by element, it is nearly the L1 distance of the estimated data from the target.
    In terms of the noise it weights an error by `sigma / alpha`, strongly in favour of the noisy
    end, which is what one-step sampling needs; the bounded slope keeps that weight stable where
    squares would not.

    Args:
        c: the error at which the loss turns from quadratic to linear.

    Source: arXiv 2410.07303, official training code (its text states `NoiseL2`).
    """

    c: float = 1e-3

    def __post_init__(self) -> None:
        positive("c", self.c)

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        return element_huber(implied_error(regression, "data"), self.c)


@dataclass(frozen=True)
class NoiseL2:
    """The mean of squared errors of the noise that a prediction implies.

    The loss of plain diffusion training, for networks of any prediction; it is `L2` for networks
    that predict the noise.

    Source: arXiv 2410.07303, algorithm 1.
    """

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        return implied_error(regression, "noise").square().flatten(1).mean(1)


def element_huber(difference: Float[Tensor, "b *dims"], c: float) -> Float[Tensor, " b"]:
    """The mean over a sample's dimensions of `sqrt(d² + c²) - c`.

    Example:
        >>> element_huber(torch.tensor([[0.0, 4.0]]), 3.0)
        tensor([1.])
    """
    squared = difference.square()
    # The difference of the roots, written so that it does not cancel for small errors.
    return (squared / ((squared + c * c).sqrt() + c)).flatten(1).mean(1)


def implied_error(regression: Regression, wanted: str) -> Tensor:
    """The error in another prediction than the network's own.

    Conversions are linear in output and state together; the state is the same for both sides, so
    the error converts at state 0, without the cancellation of two large terms.
    """
    return regression.path.convert(
        regression.difference,
        torch.zeros_like(regression.x),
        regression.t,
        given=regression.prediction,
        wanted=wanted,
    )
