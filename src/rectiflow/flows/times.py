"""Which times a training step looks at.

A time sampler is any object with `sample` and `density`; the density lets losses be reweighted
and tests be exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@runtime_checkable
class TimeSampler(Protocol):
    """Draws training times in [0, 1] and knows their density."""

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`count` times, float32, on the generator's device."""

    def density(self, t: Tensor) -> Tensor:
        """The probability density at `t` (the probability, for a discrete sampler)."""


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")


@dataclass(frozen=True)
class Uniform:
    """Times spread evenly over [low, high].

    Args:
        low: smallest time. 1e-3 matches the official code of rectified flow, 0 is exact here.
        high: largest time.

    Source: arXiv 2209.03003, equation 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times need 0 <= low < high <= 1, got [{self.low}, {self.high}]")

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " count"]:
        drawn = torch.rand(count, generator=generator, device=_device(generator))
        return self.low + (self.high - self.low) * drawn

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        inside = (t >= self.low) & (t <= self.high)
        return inside.to(t.dtype) / (self.high - self.low)


@dataclass(frozen=True)
class Discrete:
    """Times drawn with equal probability from a list; one entry fixes the time.

    `Discrete((0.0,))` gives one-step distillation, `Discrete.grid(k)` the k-step form and
    `Discrete((1.0,))` the fast encoder.

    Source: arXiv 2209.03003, section 2.2 (distillation).
    """

    times: Sequence[float]

    def __post_init__(self) -> None:
        if not self.times or min(self.times) < 0 or max(self.times) > 1:
            raise ValueError(f"times must be a non-empty list within [0, 1], got {self.times}")

    @classmethod
    def grid(cls, steps: int) -> Discrete:
        """The starts of `steps` equal steps: 0, 1/steps, ..., (steps - 1)/steps."""
        positive("steps", steps)
        return cls(tuple(i / steps for i in range(steps)))

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " count"]:
        device = _device(generator)
        chosen = torch.randint(len(self.times), (count,), generator=generator, device=device)
        return torch.tensor(self.times, dtype=torch.float32, device=device)[chosen]

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        listed = torch.tensor(self.times, dtype=t.dtype, device=t.device)
        return (t.unsqueeze(-1) == listed).to(t.dtype).sum(-1) / len(self.times)
