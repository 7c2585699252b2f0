"""Paths between source and target, and exact conversion between what a network may predict.

A path mixes a target (data, t = 1) and a source (noise, t = 0): `x_t = alpha(t) target +
sigma(t) source`. Knowing `x_t` and any one of velocity, noise, data or score fixes the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.errors import unknown
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PREDICTIONS = ("velocity", "noise", "data", "score", "v")

# Denominators that vanish at an end of a path are held this far from zero.
TINY = 1e-5


def expand(t: Float[Tensor, "*batch"], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """View per-sample times `(b,)` so that they broadcast over `x` of shape `(b, ...)`."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def guard(value: Tensor) -> Tensor:
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
        return source * self.start_scale(source)

    def source_of(self, state: Float[Tensor, "b *dims"]) -> Float[Tensor, "b *dims"]:
        """The source that `start` turns into a state at t = 0."""
        return state / self.start_scale(state)

    def start_scale(self, like: Tensor) -> Float[Tensor, ""]:
        """The standard deviation of states at t = 0 for a standard normal source."""
        # Large scales are raised to powers, which half precision would round.
        zero = torch.zeros((), dtype=wide(like).dtype, device=like.device)
        return self.sigma(zero).to(like.dtype)

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
            return -source / guard(self.sigma(expand(t, source)))
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
            determinant = guard(alpha * dsigma - dalpha * sigma)
            if wanted == "data":
                return (dsigma * x - sigma * output) / determinant
            noise = (alpha * output - dalpha * x) / determinant
            if wanted == "v":
                return alpha * noise - sigma * (dsigma * x - sigma * output) / determinant
            return noise if wanted == "noise" else -noise / guard(sigma)
        if given == "v":
            norm = alpha.square() + sigma.square()
            data, noise = (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
        elif given == "data":
            data, noise = output, (x - alpha * output) / guard(sigma)
        else:
            noise = output if given == "noise" else -sigma * output
            data = (x - sigma * noise) / guard(alpha)
        if wanted == "data":
            return data
        if wanted == "noise":
            return noise
        if wanted == "score":
            return -noise / guard(sigma)
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

    def _convert(self, output: Tensor, x: Tensor, t: Tensor, given: str, wanted: str) -> Tensor:
        if given != "velocity":
            return super()._convert(output, x, t, given, wanted)
        # The speed vanishes at the data, where two equations would divide by nothing.
        data = x + (1 - t) / self.power * output
        if wanted == "data":
            return data
        alpha = self.alpha(t)
        noise = x - alpha / guard(self.dalpha(t)) * output
        if wanted == "noise":
            return noise
        if wanted == "score":
            return -noise / guard(self.sigma(t))
        return alpha * noise - self.sigma(t) * data
