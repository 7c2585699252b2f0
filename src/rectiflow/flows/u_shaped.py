"""Training times that favour both ends of the path, for reflow."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.flows.couplings import Independent, innermost

if TYPE_CHECKING:
    from jaxtyping import Float

# Beyond this sinh(a / 2) nears the largest float32, and all times lie at the ends anyway.
LARGEST = 100.0


@dataclass(frozen=True)
class UShaped:
    """Times with density proportional to `exp(a t) + exp(-a t)` mirrored about 1/2.

    For reflow and distillation: on pairs made by a flow, the loss that can still be reduced sits
    at both ends (t = 0, where one step starts, and t = 1). On independent pairs it does not, and
    a method built with them warns. Drawn by the inverse of the distribution function,
    `t = 1/2 + asinh((2u - 1) sinh(a/2)) / a` for u uniform; a = 0 is the uniform distribution.

    Args:
        a: how much the ends are favoured; their density is `cosh(a/2)` times that of the middle.
        margin: part cut off at either end; the official code uses 1e-5, 0 is exact here.

    Raises:
        ValueError: `a` outside [0, 100] or a margin outside [0, 0.5).

    Example:
        >>> UShaped(4.0).density(torch.tensor([0.0, 0.5, 1.0]))
        tensor([2.0746, 0.5514, 2.0746])

    Source: arXiv 2405.20320, section 4.1, in the symmetric form of its code.
    """

    a: float = 4.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        positive("a", self.a, zero=True)
        if not self.a <= LARGEST:
            raise ValueError(f"a must be at most {LARGEST:g}, got {self.a}")
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"margin must be in [0, 0.5), got {self.margin}")

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[torch.Tensor, " count"]:
        device = generator.device if generator is not None else torch.device("cpu")
        drawn = torch.rand(count, generator=generator, device=device)
        if self.a:
            drawn = 0.5 + torch.asinh((2 * drawn - 1) * math.sinh(self.a / 2)) / self.a
        # Rounding may leave [0, 1] by one part in 10^7.
        return self.margin + (1 - 2 * self.margin) * drawn.clamp(0, 1)

    def density(self, t: Float[torch.Tensor, "*b"]) -> Float[torch.Tensor, "*b"]:
        inside = (t >= self.margin) & (t <= 1 - self.margin)
        width, unit = self._unit(t)
        if not self.a:
            return inside.to(t.dtype) / width
        ends = (-self.a * unit).exp() + (-self.a * (1 - unit)).exp()
        return inside.to(t.dtype) * (0.5 * self.a / -math.expm1(-self.a) / width) * ends

    def cdf(self, t: Float[torch.Tensor, "*b"]) -> Float[torch.Tensor, "*b"]:
        """The probability of times up to `t`: `1/2 + sinh(a (t - 1/2)) / (2 sinh(a/2))`."""
        unit = self._unit(t)[1].clamp(0, 1)
        if not self.a:
            return unit
        rise = (-self.a * (1 - unit)).exp() - (-self.a * unit).exp()
        return 0.5 + 0.5 * rise / -math.expm1(-self.a)

    def _unit(self, t: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The width of the range, and times as parts of it."""
        width = 1 - 2 * self.margin
        return width, (t - self.margin) / width


def warn_if_independent(times: Any, coupling: Any) -> None:
    """Warn when U-shaped times meet pairs that no flow has made."""
    if isinstance(times, UShaped) and isinstance(innermost(coupling), Independent):
        warnings.warn(
            "U-shaped times are for pairs made by a flow: on independent pairs the loss does not "
            "sit at the ends, use Uniform or LogitNormal there",
            stacklevel=4,
        )
