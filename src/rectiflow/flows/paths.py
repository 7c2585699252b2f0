"""Paths between source and target, and exact conversion between what a network may predict.

A path mixes a target (data, t = 1) and a source (noise, t = 0): `x_t = alpha(t) target +
sigma(t) source`. Knowing `x_t` and any one of velocity, noise, data or score fixes the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.errors import positive, unknown

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PREDICTIONS = ("velocity", "noise", "data", "score", "v")

# Denominators that vanish at an end of a path are held this far from zero.
TINY = 1e-5


def expand(t: Float[Tensor, "*batch"], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """View per-sample times `(b,)` so that they broadcast over `x` of shape `(b, ...)`."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _guard(value: Tensor) -> Tensor:
    """Keep a denominator away from zero without changing its sign."""
    return torch.where(value < 0, value.clamp(max=-TINY), value.clamp(min=TINY))


@dataclass(frozen=True)
class Path(ABC):
    """A family `x_t = alpha(t) target + sigma(t) source`, for t in [0, 1].

    Subclasses give the two coefficients and their derivatives for a tensor of times; everything
    else follows. `x_0` is (nearly) pure source and `x_1` (nearly) pure target.

    Source: arXiv 2209.03003, section 2.3 (interpolants); the time runs from noise to data.
    """

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Weight of the target."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Weight of the source."""

    @abstractmethod
    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Derivative of `alpha`."""

    @abstractmethod
    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Derivative of `sigma`."""

    def interpolate(
        self,
        source: Float[Tensor, "b *dims"],
        target: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b *dims"]:
        """The point of the path at time `t` for each pair."""
        t = expand(t, target)
        return self.alpha(t) * target + self.sigma(t) * source

    def velocity(
        self,
        source: Float[Tensor, "b *dims"],
        target: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b *dims"]:
        """The derivative in time of the point of the path, for each pair."""
        t = expand(t, target)
        return self.dalpha(t) * target + self.dsigma(t) * source

    def start(self, source: Float[Tensor, "b *dims"]) -> Float[Tensor, "b *dims"]:
        """The state at t = 0 for a source alone: `sigma(0) source`."""
        return source * self.sigma(source.new_zeros(()))

    def target_of(
        self,
        wanted: str,
        source: Float[Tensor, "b *dims"],
        target: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b *dims"]:
        """What a network of the given prediction should output for a pair (the regression target).

        Raises:
            ValueError: `wanted` is not one of velocity, noise, data, score, v.
        """
        if wanted == "velocity":
            return self.velocity(source, target, t)
        if wanted == "noise":
            return source
        if wanted == "data":
            return target
        if wanted == "score":
            return -source / _guard(self.sigma(expand(t, source)))
        if wanted == "v":
            t = expand(t, target)
            return self.alpha(t) * source - self.sigma(t) * target
        raise unknown("prediction", wanted, PREDICTIONS)

    def convert(
        self,
        output: Float[Tensor, "b *dims"],
        x: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
        *,
        given: str,
        wanted: str,
    ) -> Float[Tensor, "b *dims"]:
        """Turn one prediction at `(x, t)` into another.

        With data `D` and noise `N`, `x = alpha D + sigma N` and `v = alpha' D + sigma' N` are two
        linear equations; the score is `-N / sigma`. Where a path makes the answer undetermined
        (the data from the noise at alpha = 0, the noise from the data at sigma = 0), the
        denominator is held at 1e-5, so results stay finite.

        Args:
            output: the prediction to convert.
            x: the state at which it was made.
            t: times in [0, 1], one per sample.
            given: what `output` is: velocity, noise, data, score (of a standard normal source), v.
            wanted: what to return.

        Raises:
            ValueError: an unknown prediction.

        Example:
            >>> path, x, t = RectifiedPath(), torch.tensor([[2.0]]), torch.tensor([0.25])
            >>> path.convert(torch.tensor([[4.0]]), x, t, given="velocity", wanted="data")
            tensor([[5.]])
        """
        for kind in (given, wanted):
            if kind not in PREDICTIONS:
                raise unknown("prediction", kind, PREDICTIONS)
        if given == wanted:
            return output
        # Times are float32 at least; a state of lower precision keeps its own dtype.
        return self._convert(output, x, expand(t, x), given, wanted).to(x.dtype)

    def _convert(self, output: Tensor, x: Tensor, t: Tensor, given: str, wanted: str) -> Tensor:
        alpha, sigma = self.alpha(t), self.sigma(t)
        if given == "velocity":
            dalpha, dsigma = self.dalpha(t), self.dsigma(t)
            determinant = _guard(alpha * dsigma - dalpha * sigma)
            if wanted == "data":
                return (dsigma * x - sigma * output) / determinant
            noise = (alpha * output - dalpha * x) / determinant
            if wanted == "v":
                return alpha * noise - sigma * (dsigma * x - sigma * output) / determinant
            return noise if wanted == "noise" else -noise / _guard(sigma)
        if given == "v":
            norm = alpha.square() + sigma.square()
            data, noise = (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
        elif given == "data":
            data, noise = output, (x - alpha * output) / _guard(sigma)
        else:
            noise = output if given == "noise" else -sigma * output
            data = (x - sigma * noise) / _guard(alpha)
        if wanted == "data":
            return data
        if wanted == "noise":
            return noise
        if wanted == "score":
            return -noise / _guard(sigma)
        if wanted == "v":
            return alpha * noise - sigma * data
        return self.dalpha(t) * data + self.dsigma(t) * noise

    def config(self) -> dict[str, Any]:
        """The name and the parameters, as plain values that `build` turns back into the path."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class RectifiedPath(Path):
    """Straight lines at constant speed: `x_t = t target + (1 - t) source`.

    Source: arXiv 2209.03003, equation 1.
    """

    name: ClassVar[str] = "rectified"

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return t

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return 1 - t

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.ones_like(t)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -torch.ones_like(t)


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
        return -self.alpha(t) * self.dalpha(t) / _guard(self.sigma(t))


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
        return -(self.sigma_min**2) * self._log_ratio * growth / _guard(self.sigma(t))


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
        return -t / _guard(self.sigma(t))


@dataclass(frozen=True)
class PacedPath(Path):
    """Straight lines at a changing pace: `alpha = 1 - (1 - t)^power`, `sigma = 1 - alpha`.

    A power above 1 moves fast at first and slowly near the data. Marginals, couplings and
    straightening are those of `RectifiedPath`; only the pace differs.

    Source: arXiv 2209.03003, section 2.3 (time change).
    """

    power: float = 2.0
    name: ClassVar[str] = "paced"

    def __post_init__(self) -> None:
        if self.power < 1:
            raise ValueError(f"power must be >= 1, got {self.power}: below 1 the speed is infinite")

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return 1 - (1 - t) ** self.power

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return (1 - t) ** self.power

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self.power * (1 - t) ** (self.power - 1)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return -self.dalpha(t)


PATHS: dict[str, type[Path]] = {
    kind.name: kind
    for kind in (
        RectifiedPath,
        VariancePreservingPath,
        SubVPPath,
        CosinePath,
        EDMPath,
        VarianceExplodingPath,
        ConstantSpeedVPPath,
        PacedPath,
    )
}


def build(name: str, **config: Any) -> Path:
    """The path of a name and its parameters, as stored in a model's configuration.

    Example:
        >>> build("edm", sigma_max=10.0)
        EDMPath(sigma_min=0.002, sigma_max=10.0, rho=7.0)
    """
    # Imported here: schedules are paths themselves.
    from rectiflow.flows.schedules import SchedulePath

    known: dict[str, Any] = {**PATHS, SchedulePath.name: SchedulePath}
    if name not in known:
        raise unknown("path", name, known)
    try:
        return known[name](**config)
    except TypeError:
        accepted = ", ".join(f.name for f in fields(known[name])) or "no parameters"
        given = ", ".join(config) or "none"
        raise ValueError(f"path {name!r} takes {accepted}, got {given}") from None
