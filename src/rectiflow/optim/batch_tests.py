"""Tests of whether a batch is large enough for its gradient to be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rectiflow.errors import positive
from rectiflow.optim.gradient_statistics import GradientStatistics

if TYPE_CHECKING:
    from torch import Tensor


class BatchTest(Protocol):
    """What a controller asks for a batch size."""

    def measures(self, statistics: GradientStatistics) -> tuple[tuple[float, float], ...]:
        """Pairs (noise, signal); the batch must be at least noise / signal for each of them."""


def needed(measures: tuple[tuple[float, float], ...]) -> float:
    """The smallest batch that passes: the largest ratio of noise to signal.

    No noise asks for nothing, noise without signal for everything.

    Example:
        >>> needed(((8.0, 2.0), (3.0, 1.0))), needed(((0.0, 0.0),)), needed(((1.0, 0.0),))
        (4.0, 0.0, inf)
    """
    return max(_ratio(noise, signal) for noise, signal in measures)


def _ratio(noise: float, signal: float) -> float:
    if math.isnan(noise) or math.isnan(signal):
        raise ValueError("the gradients hold NaN: no batch size follows from them")
    if not noise > 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf


@dataclass(frozen=True)
class NormTest:
    """Whether the batch's gradient is close to the true one, relative to its length.

    A batch of b passes while `v / b <= eta² ||g||²`, with g the mean gradient and v the summed
    variance of the gradients of samples. ||g||² is taken from the batch itself, which makes the
    test optimistic while b is small.

    Args:
        eta: relative error allowed, > 0; smaller asks for larger batches.
        coordinates: test each coordinate in place of the whole: "max" (the theory's; unusable
            where some coordinates of g are nearly zero), "quantile:Q" of the coordinates, or
            "tensor" (the largest ratio of sums over a tensor). The inner-product test of single
            coordinates is the same, with theta for eta.

    Raises:
        ValueError: an eta that is not positive, an unknown aggregation.

    Example:
        >>> from rectiflow.optim import per_sample_statistics
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> rows = [torch.tensor([[1.0], [3.0]])]
        >>> found = per_sample_statistics(net, lambda net, x: net(x).sum(), rows)
        >>> round(NormTest(eta=0.5).needed(found), 4)
        2.0

    Source: arXiv 2402.11215, section 3; Byrd et al. 2012.
    """

    eta: float = 0.1
    coordinates: str | None = None

    def __post_init__(self) -> None:
        positive("eta", self.eta)
        if self.coordinates is not None:
            _aggregation(self.coordinates)

    def needed(self, statistics: GradientStatistics) -> float:
        """The smallest batch that passes."""
        return needed(self.measures(statistics))

    def measures(self, statistics: GradientStatistics) -> tuple[tuple[float, float], ...]:
        """See `BatchTest`."""
        if self.coordinates is None:
            return ((statistics.noise / self.eta**2, statistics.signal),)
        share = _aggregation(self.coordinates)
        if share is None:
            return tuple(
                (float(v.sum()) / self.eta**2, float(m.square().sum()))
                for v, m in zip(statistics.variances(), statistics.mean)
            )
        ratio = _quantile(_ratios(statistics), share)
        return ((ratio / self.eta**2, 1.0),)


def _aggregation(name: str) -> float | None:
    """The quantile that an aggregation takes over coordinates; None for sums over tensors."""
    word, _, number = name.partition(":")
    if name in ("max", "tensor"):
        return 1.0 if name == "max" else None
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if word != "quantile" or not 0 < share <= 1:
        raise ValueError(
            f"coordinates must be 'max', 'tensor' or 'quantile:Q' with Q in (0, 1], got {name!r}"
        )
    return share


def _ratios(statistics: GradientStatistics) -> Tensor:
    """Variance over squared mean of every coordinate."""
    ratios = []
    for v, m in zip(statistics.variances(), statistics.mean):
        if v.shape != m.shape:
            raise ValueError(
                "squares of single coordinates were not kept: ask for statistics with "
                "coordinates=True"
            )
        ratios.append(torch.where(v == 0, 0, v / m.square()).flatten())
    return torch.cat(ratios)


def _quantile(values: Tensor, share: float) -> float:
    """The least value with at least that share at or below it; NaN if one is."""
    if values.isnan().any():
        return math.nan
    return float(torch.kthvalue(values, max(1, math.ceil(share * len(values)))).values)


@dataclass(frozen=True)
class InnerProductTest:
    """Whether the batch's gradient points forward along the true one.

    A batch of b passes while `s / b <= theta² ||g||⁴`, with s the variance of the inner products
    of samples' gradients with the mean g; augmented, also while `w / b <= nu² ||g||²`, with w the
    variance at a right angle to g. Needs statistics with inner=True.

    Args:
        theta: relative error allowed along g, > 0.
        nu: error allowed across; None leaves that out.
        by_tensor: sum the variances of each tensor's part of the inner product, as the released
            code does, without covariances between tensors: smaller batches.

    Raises:
        ValueError: theta or nu not positive.

    Source: arXiv 2402.11215, section 3; Bollapragada et al. 2018.
    """

    theta: float = 0.5
    nu: float | None = None
    by_tensor: bool = False

    def __post_init__(self) -> None:
        positive("theta", self.theta)
        if self.nu is not None:
            positive("nu", self.nu)

    def needed(self, statistics: GradientStatistics) -> float:
        """The smallest batch that passes."""
        return needed(self.measures(statistics))

    def measures(self, statistics: GradientStatistics) -> tuple[tuple[float, float], ...]:
        """See `BatchTest`."""
        signal = statistics.signal
        along = statistics.along_tensors if self.by_tensor else statistics.along
        found = [(along / self.theta**2, signal**2)]
        if self.nu is not None:
            # What is not along the mean is across it: the variance is the sum of both.
            own = statistics.along / signal if signal > 0 else 0.0
            found.append((max(statistics.noise - own, 0.0) / self.nu**2, signal))
        return tuple(found)
