"""A normal generator matched to a mixture by quadrature: distribution matching without networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rectiflow.distill.divergences import DIVERGENCES, Divergence

if TYPE_CHECKING:
    from jaxtyping import Float

SHARES, MEANS, STD = (0.6, 0.4), (-2.0, 2.0), 0.5
"""The data: two unequal normal modes."""
SEEKING, COVERING = ("rkl", "sf"), ("jf", "sh", "js", "kl")


@dataclass(frozen=True)
class ExactSettings:
    """The experiment on a grid."""

    noises: tuple[float, ...] = (0.3, 0.6, 1.2)
    """Standard deviations of the noise at which the distributions are compared."""
    start: tuple[float, float] = (-0.8, 0.8)
    """Mean and standard deviation at the start."""
    points: int = 401
    """Points of the grid."""
    reach: float = 12.0
    """The grid goes from minus this to this."""
    steps: int = 400
    """Steps of gradient descent."""
    rate: float = 0.5
    """Their length, over the mean weight."""


@dataclass(frozen=True)
class Fitted:
    """The end of one descent.

    Attributes:
        mean: the generator's.
        std: its standard deviation.
        path: means and standard deviations on the way, `(steps + 1, 2)`.
    """

    mean: float
    std: float
    path: Tensor


def moments() -> tuple[float, float]:
    """Mean and standard deviation of the data.

    Example:
        >>> [round(value, 3) for value in moments()]
        [-0.4, 2.022]
    """
    mean = sum(share * centre for share, centre in zip(SHARES, MEANS))
    second = sum(share * (centre**2 + STD**2) for share, centre in zip(SHARES, MEANS))
    return mean, math.sqrt(second - mean**2)


def data_log_density(
    x: Float[Tensor, " n"], noise: Float[Tensor, "levels 1"]
) -> Float[Tensor, "levels n"]:
    """Log-density of the noised data at every level of noise."""
    variance = STD**2 + noise.square()
    terms = [
        math.log(share) - 0.5 * (x - centre).square() / variance
        for share, centre in zip(SHARES, MEANS)
    ]
    return torch.stack(terms).logsumexp(0) - 0.5 * (2 * math.pi * variance).log()


def _normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (x - mean).square() / variance - 0.5 * (2 * math.pi * variance).log()


def _grid(settings: ExactSettings) -> tuple[Tensor, Tensor, float]:
    """Points, noise levels as a column, and the distance of points."""
    x = torch.linspace(-settings.reach, settings.reach, settings.points, dtype=torch.float64)
    noise = torch.tensor(settings.noises, dtype=torch.float64).unsqueeze(1)
    return x, noise, 2 * settings.reach / (settings.points - 1)


def objective(
    divergence: Divergence, mean: Tensor, std: Tensor, settings: ExactSettings
) -> Float[Tensor, ""]:
    """`sum over noises of E_q[f(p / q)]`, by quadrature; differentiable in mean and std."""
    x, noise, width = _grid(settings)
    log_q = _normal(x, mean, std.square() + noise.square())
    ratio = (data_log_density(x, noise) - log_q).exp()
    return (log_q.exp() * divergence.f(ratio)).sum() * width


def weighted_gradient(
    divergence: Divergence, mean: Tensor, std: Tensor, settings: ExactSettings
) -> Float[Tensor, "2"]:
    """The gradient by the theorem: scores' difference weighted by h, along the samples' paths.

    A noised sample is `mean + std z + noise e`; at a state y the mean of z is
    `std (y - mean) / (std² + noise²)`, so only an integral over y is left.
    """
    x, noise, width = _grid(settings)
    variance = std.square() + noise.square()
    log_q = _normal(x, mean, variance)
    ratio = (data_log_density(x, noise) - log_q).exp()
    pull = log_q.exp() * divergence.weight(ratio) * (-(x - mean) / variance - _data_score(x, noise))
    along = torch.stack([torch.ones_like(pull), std * (x - mean) / variance])
    return (pull * along).sum((1, 2)) * width


def _data_score(x: Tensor, noise: Tensor) -> Tensor:
    """The gradient of the log-density of the noised data."""
    variance = STD**2 + noise.square()
    offsets = torch.stack([(x - centre).expand(len(noise), -1) for centre in MEANS])
    logits = torch.stack(
        [math.log(share) - 0.5 * o.square() / variance for share, o in zip(SHARES, offsets)]
    )
    return -(logits.softmax(0) * offsets).sum(0) / variance


@torch.no_grad()
def fit(divergence: Divergence, settings: ExactSettings) -> Fitted:
    """Gradient descent on mean and standard deviation, with weights of mean one."""
    x, noise, width = _grid(settings)
    at = torch.tensor(settings.start, dtype=torch.float64)
    path = [at]
    for _ in range(settings.steps):
        mean, std = at
        log_q = _normal(x, mean, std.square() + noise.square())
        ratio = (data_log_density(x, noise) - log_q).exp()
        # As in training: the weights' mean over samples and noises is one.
        scale = (log_q.exp() * divergence.weight(ratio)).sum() * width / len(noise)
        gradient = weighted_gradient(divergence, mean, std, settings)
        at = at - settings.rate * gradient / (scale * len(noise))
        path.append(at)
    return Fitted(float(at[0]), float(at[1]), torch.stack(path))


def fit_all(settings: ExactSettings, names: Sequence[str]) -> Mapping[str, Fitted]:
    """The ends of the descents under several divergences."""
    return {name: fit(DIVERGENCES[name], settings) for name in names}
