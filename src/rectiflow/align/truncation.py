"""Which steps of a sampling chain carry gradient: rules that pick the first one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

from rectiflow.errors import positive, unknown


class Truncation(Protocol):
    """Picks the first step that carries gradient, from one uniform number.

    A rule is the inverse of its distribution function, so one draw a micro-batch suffices, no draw
    can fail to end, and an equal grid of numbers visits every outcome in proportion.
    """

    def first(self, steps: int, uniform: float) -> int:
        """The index of the first step with gradient, from 0 to `steps - 1`.

        Args:
            steps: steps of the chain.
            uniform: a number in [0, 1).

        Raises:
            ValueError: a rule that asks for more steps than there are.
        """


@dataclass(frozen=True)
class Fixed:
    """The gradient always begins at the same step; 0 is the whole chain.

    Args:
        start: index of the first step with gradient.

    Raises:
        ValueError: a negative index, or (when drawn) one past the last step.

    Example:
        >>> Fixed(49).first(50, 0.3)
        49
    """

    start: int = 0

    def __post_init__(self) -> None:
        positive("start", self.start, zero=True)

    def first(self, steps: int, uniform: float) -> int:
        """The index of the first step with gradient."""
        if self.start >= steps:
            raise ValueError(
                f"the gradient cannot begin at step {self.start} of {steps}: give 0 to {steps - 1}"
            )
        return self.start


@dataclass(frozen=True)
class LastK:
    """The last `count` steps carry gradient, as in DRaFT-K.

    Args:
        count: how many, at least 1.

    Raises:
        ValueError: no step, or (when drawn) more than there are.

    Example:
        >>> LastK(1).first(20, 0.3)
        19

    Source: arXiv 2309.17400 (DRaFT-K).
    """

    count: int = 1

    def __post_init__(self) -> None:
        positive("count", self.count)

    def first(self, steps: int, uniform: float) -> int:
        """The index of the first step with gradient."""
        if self.count > steps:
            raise ValueError(f"{self.count} steps cannot carry gradient: the chain has {steps}")
        return steps - self.count


@dataclass(frozen=True)
class Uniform:
    """The number of last steps with gradient is uniform from `low` to `high`.

    The paper's rule. The least is 1: a chain without gradient teaches nothing.

    Args:
        low: least number of steps with gradient.
        high: largest number, included; all steps by default.

    Raises:
        ValueError: an empty range, or (when drawn) one beyond the steps.

    Example:
        >>> [Uniform().first(4, u) for u in (0.0, 0.3, 0.6, 0.9)]
        [3, 2, 1, 0]

    Source: arXiv 2310.03739, section 4.1 (randomised truncation); the official bounds, which
        include zero steps, are not copied.
    """

    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        positive("low", self.low)
        if self.high is not None and self.high < self.low:
            raise ValueError(f"high must be >= low, got {self.low} to {self.high}")

    def first(self, steps: int, uniform: float) -> int:
        """The index of the first step with gradient."""
        high = steps if self.high is None else self.high
        if max(high, self.low) > steps:
            raise ValueError(
                f"{max(high, self.low)} steps cannot carry gradient: the chain has {steps}"
            )
        return steps - (self.low + int(uniform * (high - self.low + 1)))


@dataclass(frozen=True)
class Normal:
    """The first step with gradient is normal, kept within 1 and the last step.

    The rule that the official scripts run, with a mean of 42 and a deviation of 5 for 50 steps.
    It leaves 16 % of the steps their gradient on average and never the whole chain. The truncated
    distribution is drawn by its inverse, not by trying again.

    Args:
        mean: mean index; 0.84 of the steps by default.
        std: its standard deviation; 0.1 of the steps by default.

    Raises:
        ValueError: a deviation that is not positive, or (when drawn) a mean so far outside the
            chain that nothing of the distribution lies within.

    Example:
        >>> [Normal().first(50, u) for u in (0.0, 0.5, 0.999)]
        [1, 41, 49]

    Source: the configuration of the official code of arXiv 2310.03739.
    """

    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None:
            positive("std", self.std)

    def first(self, steps: int, uniform: float) -> int:
        """The index of the first step with gradient."""
        if steps == 1:
            return 0
        mean = 0.84 * steps if self.mean is None else self.mean
        normal = NormalDist(mean, 0.1 * steps if self.std is None else self.std)
        # Rounding down makes an index of everything from 1 up to, not including, `steps`.
        low, high = normal.cdf(1), normal.cdf(steps)
        if high - low < 1e-9:
            raise ValueError(
                f"no step of 1 to {steps - 1} is within reach of a mean of {mean:g} and a deviation"
                f" of {normal.stdev:g}: move the mean into the chain"
            )
        inside = min(max(low + uniform * (high - low), 1e-300), 1 - 1e-16)
        return min(max(int(normal.inv_cdf(inside)), 1), steps - 1)


def _whole(text: str) -> int:
    return int(text)


_RULES: dict[str, tuple[Callable[..., Any], Callable[[str], Any], int]] = {
    "fixed": (Fixed, _whole, 1),
    "full": (Fixed, _whole, 0),
    "last": (LastK, _whole, 1),
    "normal": (Normal, float, 2),
    "uniform": (Uniform, _whole, 2),
}


def parse_truncation(spec: str) -> Truncation:
    """The rule of a word: full, last:K, uniform[:LOW:HIGH], normal[:MEAN:STD] or fixed:I.

    Raises:
        ValueError: an unknown rule, or numbers it does not take.

    Example:
        >>> parse_truncation("last:4"), parse_truncation("full")
        (LastK(count=4), Fixed(start=0))
    """
    name, *values = spec.split(":")
    if name not in _RULES:
        raise unknown("truncation", name, _RULES)
    rule, kind, most = _RULES[name]
    try:
        numbers = [kind(value) for value in values]
    except ValueError:
        numbers = [None] * (most + 1)
    if len(numbers) > most:
        takes = "no number" if most == 0 else f"up to {most} number{'s' if most > 1 else ''}"
        raise ValueError(
            f"truncation {name!r} takes {takes}, got {spec!r}: see last:1 or uniform:1:20"
        )
    return rule(*numbers)
