"""Training times that favour some noise levels: logit-normal, mode and cosine-map samplers.

The paper's time is the noise level, 1 for noise; ours is `t = 1 - level`. Arguments keep the
paper's sign and are said in terms of the noise level; `sample`, `density` and `cdf` speak our t.
Drawing times from one of these or weighting the losses of uniform times by its density are the
same objective: do one of them, never both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import positive, unknown
from rectiflow.flows.time_shift import TimeShift
from rectiflow.flows.times import TimeSampler, Uniform

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Beyond it the map of `Mode` is no longer monotone.
MODE_LIMIT = 2 / (math.pi - 2)
# Halvings of [0, 1] that reach the spacing of float64.
HALVINGS = 54


def _uniform(count: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(count, generator=generator, device=device)


def _inside(t: Tensor) -> Tensor:
    return (t >= 0) & (t <= 1)


@dataclass(frozen=True)
class LogitNormal:
    """Times whose noise level has a normal logit: the middle often, the ends hardly ever.

    The level is sigmoid(u) with u normal, so the log signal-to-noise ratio is normal with mean
    -2 mean and deviation 2 std. In our time t = 1 - level:
    `density(t) = exp(-(logit(1 - t) - mean)² / (2 std²)) / (std sqrt(2 pi) t (1 - t))`.
    The density vanishes at both ends; after reflow, when the ends matter most, use another.

    Args:
        mean: of the logit of the *noise level*, the paper's m: below 0 favours data (t near 1),
            above 0 noise (t near 0).
        std: of the logit.

    Raises:
        ValueError: a `std` that is not positive.

    Example:
        >>> times = LogitNormal(mean=1.0)  # toward noise
        >>> bool(times.cdf(torch.tensor(0.5)) > 0.8)
        True

    Source: arXiv 2403.03206, equation 19; (0, 1) has the best average rank there.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        positive("std", self.std)

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " count"]:
        device = generator.device if generator is not None else torch.device("cpu")
        normal = torch.randn(count, generator=generator, device=device)
        return torch.sigmoid(-(self.mean + self.std * normal))

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        inner = (t > 0) & (t < 1)
        safe = torch.where(inner, t, 0.5)
        z = (torch.logit(1 - safe) - self.mean) / self.std
        found = (-0.5 * z.square()).exp() / (self.std * math.sqrt(2 * math.pi) * safe * (1 - safe))
        return torch.where(inner, found, 0.0)

    def cdf(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The probability of a time up to `t`."""
        return torch.special.ndtr((torch.logit(t.clamp(0, 1)) + self.mean) / self.std)


@dataclass(frozen=True)
class Mode:
    """Times with a density that is highest (or lowest) in the middle and positive at the ends.

    The level is `f(u) = 1 - u - scale (cos²(pi u / 2) - 1 + u)` for uniform u. Unlike the
    logit-normal it never starves the ends: `density(0) = density(1) = 1 / (1 + scale)`. It is
    symmetric, so the direction of time does not matter.

    Args:
        scale: above 0 favours the middle, below 0 the ends, 0 is uniform; from -1 to
            2 / (pi - 2) = 1.7519, where the density in the middle becomes infinite.

    Raises:
        ValueError: a scale for which f is not monotone.

    Example:
        >>> Mode(1.0).density(torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.5000])

    Source: arXiv 2403.03206, equation 20. The inverse of f has no closed form and is bisected.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= MODE_LIMIT:
            raise ValueError(f"scale must be from -1 to {MODE_LIMIT:.4f}, got {self.scale}")

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " count"]:
        return 1 - self._level(_uniform(count, generator)).clamp(0, 1)

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        u = self._inverse(t.double().clamp(0, 1))
        slope = -1 - self.scale + self.scale * (math.pi / 2) * torch.sin(math.pi * u)
        return torch.where(_inside(t), slope.abs().reciprocal().to(t.dtype), 0.0)

    def cdf(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The probability of a time up to `t`."""
        # f falls and is point-symmetric: level(u) >= 1 - t where u <= inverse(1 - t).
        return self._inverse(1 - t.double().clamp(0, 1)).to(t.dtype)

    def _level(self, u: Tensor) -> Tensor:
        """The paper's f."""
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)

    def _inverse(self, level: Tensor) -> Tensor:
        low, high = torch.zeros_like(level), torch.ones_like(level)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = self._level(middle) > level
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class CosMap:
    """Times at which a rectified path has the noise levels of the cosine schedule.

    The level is `1 - 1 / (tan(pi u / 2) + 1)` for uniform u, so that the log signal-to-noise
    ratio has the law of the path `cos(pi u / 2) data + sin(pi u / 2) noise`. The density
    `2 / (pi - 2 pi t + 2 pi t²)` is symmetric: the direction of time does not matter.

    Example:
        >>> CosMap().cdf(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])

    Source: arXiv 2403.03206, equation 21.
    """

    def sample(
        self, count: int, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " count"]:
        # 1 / (tan + 1) with the poles of the tangent taken out.
        angle = math.pi / 2 * _uniform(count, generator)
        return angle.cos() / (angle.cos() + angle.sin())

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        found = 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
        return torch.where(_inside(t), found, 0.0)

    def cdf(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The probability of a time up to `t`."""
        inside = t.clamp(0, 1)
        return 2 / math.pi * torch.atan2(inside, 1 - inside)


def from_diffusers_args(
    weighting_scheme: str = "none",
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    shift: float = 1.0,
) -> TimeSampler:
    """The time sampler that diffusers' training scripts use under these arguments.

    Those scripts look a draw u up in a list of falling noise levels, so u stands for 1 - level
    and their `logit_mean` has the opposite sign of the paper's (and of ours); the levels they
    find are already shifted by their scheduler. Symmetric choices hide both. The scheme "cosmap"
    weights uniform times by the density of `CosMap`, the same objective as drawing from it.

    Args:
        weighting_scheme: none, logit_normal, mode or cosmap.
        logit_mean: their mean; above 0 favours data.
        logit_std: standard deviation of the logit.
        mode_scale: scale of the mode sampler.
        shift: the `shift` of their scheduler.

    Raises:
        ValueError: an unknown scheme, "sigma_sqrt" (a weight of losses that is no density), or
            "cosmap" with a shift (a weight on shifted times, which no sampler stands for).

    Example:
        >>> from_diffusers_args("logit_normal", logit_mean=0.5).mean
        -0.5
    """
    if weighting_scheme == "sigma_sqrt":
        raise ValueError(
            "sigma_sqrt weights losses by level**-2, which has no finite integral and so no "
            "sampler: choose none, logit_normal, mode or cosmap"
        )
    samplers: dict[str, TimeSampler] = {
        "none": Uniform(),
        "logit_normal": LogitNormal(-logit_mean, logit_std),
        "mode": Mode(mode_scale),
        "cosmap": CosMap(),
    }
    if weighting_scheme not in samplers:
        raise unknown("weighting scheme", weighting_scheme, samplers)
    found = samplers[weighting_scheme]
    if shift == 1:
        return found
    if weighting_scheme == "cosmap":
        raise ValueError(
            f"cosmap weights times that are shifted by {shift:g}, which no sampler stands for: "
            "use shift 1, or TimeShift(shift, CosMap()) for a shifted sampler"
        )
    return TimeShift(shift, found)
