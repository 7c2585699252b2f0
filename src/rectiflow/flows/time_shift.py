"""Times moved toward noise, as images of more pixels need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.times import Discrete, TimeSampler, Uniform

if TYPE_CHECKING:
    from jaxtyping import Float

Times = TypeVar("Times", float, Tensor)
# Noise levels of diffusers' scheduler are thousandths.
FINEST = 1000


def resolution_shift(pixels: float, trained: float) -> float:
    """The shift for images of `pixels` by what was right for images of `trained` pixels.

    `sqrt(pixels / trained)`: with it, the noise leaves the mean of the image as uncertain as
    before. The same ratio results from numbers of tokens.

    Example:
        >>> resolution_shift(1024**2, 512**2)
        2.0

    Source: arXiv 2403.03206, equation 23; at 1024x1024 people preferred 3.0.
    """
    positive("pixels", pixels)
    positive("trained", trained)
    return math.sqrt(pixels / trained)


def shift_times(t: Times, alpha: float) -> Times:
    """Times with the same log signal-to-noise ratio less 2 log(alpha).

    The noise level s = 1 - t becomes `alpha s / (1 + (alpha - 1) s)`, that is
    `t / (t + alpha (1 - t))`. Shifts multiply (`alpha` then `beta` is `alpha beta`), 1 / alpha
    undoes alpha, and both ends stay where they are.

    Args:
        t: times in [0, 1], 1 for data.
        alpha: above 1 moves toward noise.

    Raises:
        ValueError: an `alpha` that is not positive.

    Example:
        >>> shift_times(0.5, 3.0)
        0.25

    Source: arXiv 2403.03206, equation 23, where 1 stands for noise.
    """
    positive("alpha", alpha)
    return t / (t + alpha * (1 - t))


def shifted_times(steps: int, alpha: float, *, legacy: bool = False) -> list[float]:
    """A grid of times for a solver, equally spaced and then shifted, once.

    For `integrate(field, x, shifted_times(28, 3.0))` and models trained on shifted times or
    larger images than the grid was made for.

    Args:
        steps: number of steps.
        alpha: the shift, as in `shift_times`.
        legacy: reproduce diffusers' `FlowMatchEulerDiscreteScheduler` and the released sampling
            script, whose grid ends at its smallest noise level, is shifted twice there, and
            wastes most of the last step.

    Returns:
        steps + 1 times from 0 to 1.

    Example:
        >>> [round(1 - t, 4) for t in shifted_times(4, 3.0)]
        [1.0, 0.9, 0.75, 0.5, 0.0]
        >>> [round(1 - t, 4) for t in shifted_times(4, 3.0, legacy=True)]
        [1.0, 0.8577, 0.6022, 0.0089, 0.0]
    """
    positive("steps", steps)
    positive("alpha", alpha)
    if not legacy:
        return [shift_times(i / steps, alpha) for i in range(steps + 1)]
    lowest = 1 - shift_times(1 - 1 / FINEST, alpha)
    gaps = max(steps - 1, 1)
    levels = [1 + (lowest - 1) * i / gaps for i in range(steps)]
    return [*(shift_times(1 - level, alpha) for level in levels), 1.0]


@dataclass(frozen=True)
class TimeShift:
    """Another time sampler, with its times shifted toward noise.

    Train with it and sample on `shifted_times` of the same alpha: both, not one of them.

    Args:
        alpha: the shift; see `shift_times` and `resolution_shift`.
        times: the sampler inside.

    Raises:
        ValueError: an `alpha` that is not positive.

    Example:
        >>> from rectiflow.flows import Uniform
        >>> TimeShift(3.0, Uniform()).density(torch.tensor([0.0, 1.0]))
        tensor([3.0000, 0.3333])

    Source: arXiv 2403.03206, section 5.3.2.
    """

    alpha: float
    times: TimeSampler = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " count"]:
        return shift_times(self.times.sample(count, generator=generator), self.alpha)

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        inner = self.times.density(shift_times(t, 1 / self.alpha))
        if isinstance(self.times, Discrete):
            return inner
        # The slope of the inverse shift.
        return inner * self.alpha / (1 + (self.alpha - 1) * t).square()

    def cdf(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The probability of a time up to `t`, where the sampler inside knows its own."""
        inner: Any = getattr(self.times, "cdf", None)
        if inner is None:
            raise ValueError(f"{type(self.times).__name__} has no cdf")
        return inner(shift_times(t, 1 / self.alpha))
