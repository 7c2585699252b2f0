"""The paths of diffusion models in continuous time: curved, or with unscaled data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from rectiflow.errors import positive
from rectiflow.flows.paths import Path, guard

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class VariancePreservingPath(Path):
    """The path of a variance-preserving diffusion: `alpha² + sigma² = 1`, exponential `alpha`.

    `log alpha = -a (1 - t)² / 4 - b (1 - t) / 2` with a = 19.9, b = 0.1. The source is reached
    only nearly: `alpha(0) = exp(-5.025)`. The velocity is unbounded as t goes to 1.

    Source: arXiv 2209.03003, section 2.3; arXiv 2011.13456, appendix C.
    """

    a: float = 19.9
    b: float = 0.1
    name: ClassVar[str] = "vp"

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * self.a * (1 - t) ** 2 - 0.5 * self.b * (1 - t)

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self._log_alpha(t).exp()

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        # expm1 keeps the digits that 1 - alpha² loses near t = 1.
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.alpha(t) * (0.5 * self.a * (1 - t) + 0.5 * self.b)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -self.alpha(t) * self.dalpha(t) / guard(self.sigma(t))


@dataclass(frozen=True)
class SubVPPath(VariancePreservingPath):
    """The sub-variance-preserving path: `alpha` of the VP path, `sigma = 1 - alpha²`.

    Source: arXiv 2209.03003, section 2.3; arXiv 2011.13456, appendix C.
    """

    name: ClassVar[str] = "sub-vp"

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -torch.expm1(2 * self._log_alpha(t))

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -2 * self.alpha(t) * self.dalpha(t)


@dataclass(frozen=True)
class CosinePath(Path):
    """A quarter circle at constant speed: `alpha = sin(pi t / 2)`, `sigma = cos(pi t / 2)`.

    Source: arXiv 2102.09672, equation 17 (without its offset).
    """

    name: ClassVar[str] = "cosine"

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.cos(0.5 * math.pi * t)

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * t)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)


@dataclass(frozen=True)
class EDMPath(Path):
    """Noise added to unscaled data, `x = target + sigma(t) source`, on the EDM noise schedule.

    `sigma(t) = (sigma_max^(1/rho) + t (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho`; the target is
    reached up to `sigma_min`.

    Source: arXiv 2206.00364, equation 5, with t running from the largest to the smallest noise.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    name: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        positive("sigma_min", self.sigma_min)
        positive("rho", self.rho)
        positive("sigma_max - sigma_min", self.sigma_max - self.sigma_min)

    def _root(self, t: Tensor) -> tuple[Tensor, float]:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return high + t * (low - high), low - high

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(t)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self._root(t)[0] ** self.rho

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.zeros_like(t)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        root, slope = self._root(t)
        return self.rho * slope * root ** (self.rho - 1)


@dataclass(frozen=True)
class VarianceExplodingPath(Path):
    """Noise added to unscaled data with a geometric schedule that ends exactly at the data.

    `sigma(t) = sigma_min sqrt((sigma_max / sigma_min)^(2 (1 - t)) - 1)`. Choose `sigma_max` near
    the largest distance between two data points.

    Source: arXiv 2209.03003, section 2.3; arXiv 2011.13456, appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    name: ClassVar[str] = "ve"

    def __post_init__(self) -> None:
        positive("sigma_min", self.sigma_min)
        positive("sigma_max - sigma_min", self.sigma_max - self.sigma_min)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(t)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.sigma_min * torch.expm1(2 * (1 - t) * self._log_ratio).sqrt()

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.zeros_like(t)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        growth = (2 * (1 - t) * self._log_ratio).exp()
        return -(self.sigma_min**2) * self._log_ratio * growth / guard(self.sigma(t))


@dataclass(frozen=True)
class ConstantSpeedVPPath(Path):
    """The curves of the VP path at a uniform pace of `alpha`: `alpha = t`, `sigma = sqrt(1 - t²)`.

    Source: arXiv 2209.03003, section 2.3.
    """

    name: ClassVar[str] = "constant-speed-vp"

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return t

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return ((1 - t) * (1 + t)).sqrt()

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(t)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -t / guard(self.sigma(t))
