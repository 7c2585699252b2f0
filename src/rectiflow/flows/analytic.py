"""Fields known in closed form: oracles for tests, and flows that need no training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.paths import TINY, Path, RectifiedPath, expand

if TYPE_CHECKING:
    from jaxtyping import Float


class _Denoiser:
    """The members of a field on the rectified path that follow from its `denoise`."""

    path: Path

    def denoise(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        raise NotImplementedError

    def velocity(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The direction of travel: `(denoise - x) / (1 - t)`, with `1 - t` held above 1e-5."""
        gap = (1 - expand(t, x)).clamp(min=TINY)
        return ((self.denoise(x, t, **condition) - x) / gap).to(x.dtype)

    def noise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The estimate of the source: `(x - t denoise) / (1 - t)`."""
        time = expand(t, x)
        gap = (1 - time).clamp(min=TINY)
        return ((x - time * self.denoise(x, t, **condition)) / gap).to(x.dtype)


@dataclass(frozen=True, eq=False)
class SoftmaxField(_Denoiser):
    """The exact field from Gaussian noise to a finite set of points, on straight lines.

    Use it as the oracle of tests, or to see what a perfectly trained network would do: it only
    ever reproduces its data. The estimate of the target is `sum_i w_i x_i` with `w_i` proportional
    to `exp(-|x - t x_i|² / (2 std² (1 - t)²))`. At t = 0 the velocity is the mean of the data
    minus x; near t = 1 the nearest point takes all the weight. Exponents are computed in float64,
    where their cancellation does no harm.

    Args:
        data: the points, `(n, ...)`.
        std: standard deviation of the source.
        chunk: points handled at once, which bounds memory and changes nothing else.

    Raises:
        ValueError: no points, or `std` or `chunk` not positive.

    Example:
        >>> field = SoftmaxField(torch.tensor([[-1.0], [3.0]]))
        >>> field.velocity(torch.zeros(1, 1), torch.zeros(1))
        tensor([[1.]])

    Source: arXiv 2209.03003, section 2.1 (the minimiser of equation 1).
    """

    data: Tensor
    std: float = 1.0
    chunk: int = 4096
    path: Path = attribute(default_factory=RectifiedPath, init=False)

    def __post_init__(self) -> None:
        positive("std", self.std)
        positive("chunk", self.chunk)
        _check_points("data", self.data)

    def denoise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The mean of the data given the state."""
        _refuse(condition)
        return self._average(x, t)[0].view_as(x).to(x.dtype)

    def log_density(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The log-density (nats) of the states at time t < 1, a mixture of Gaussians."""
        _, exponent = self._average(x, t)
        scale = (self.std * (1 - t.double())).clamp(min=TINY)
        squared = x.double().flatten(1).square().sum(1)
        size = x[0].numel() * (scale.log() + 0.5 * math.log(2 * math.pi))
        density = exponent - 0.5 * squared / scale**2 - size - math.log(self.data.shape[0])
        return density.to(x.dtype)

    def _average(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean of the points and the log of the sum of weights, without `|x|²`."""
        state, time = x.double().flatten(1), t.double().unsqueeze(1)
        inverse = (self.std * (1 - time)).clamp(min=TINY).pow(-2)
        mean, total = torch.zeros_like(state), state.new_full((len(state), 1), -math.inf)
        for points in self.data.split(self.chunk):
            points = points.to(state).flatten(1)
            half = 0.5 * points.square().sum(1)
            logits = inverse * (time * (state @ points.T) - time.square() * half)
            found = logits.logsumexp(1, keepdim=True)
            both = torch.logaddexp(total, found)
            mean = (total - both).exp() * mean + (logits - both).exp() @ points
            total = both
        return mean, total.squeeze(1)


@dataclass(frozen=True, eq=False)
class KernelField(_Denoiser):
    """The field of given pairs, smoothed by a kernel over the nearest interpolations.

    Use it to straighten a coupling of a few thousand points without a network. The estimate of
    the target at x is the mean of the targets `y_i` of the nearest `x_i(t) = t y_i + (1 - t) z_i`,
    weighted by `exp(-|x_i(t) - x|² / (2 bandwidth))`. The bandwidth blurs: it should be small
    beside the squared distance over which the field changes.

    Args:
        source: one end of the pairs, `(n, ...)`.
        target: the other end, of the same shape.
        bandwidth: the variance of the kernel.
        neighbours: how many pairs take part at a point; all of them when there are fewer.
        chunk: pairs handled at once, which bounds memory and changes nothing else.

    Raises:
        ValueError: ends of different shapes, no pairs, or a number that is not positive.

    Example:
        >>> field = KernelField(torch.zeros(5, 1), torch.full((5, 1), 2.0))
        >>> field.velocity(torch.ones(1, 1), torch.full((1,), 0.5))
        tensor([[2.]])

    Source: arXiv 2209.03003, section 2.2 (non-parametric estimation).
    """

    source: Tensor
    target: Tensor
    bandwidth: float = 1.0
    neighbours: int = 100
    chunk: int = 4096
    path: Path = attribute(default_factory=RectifiedPath, init=False)

    def __post_init__(self) -> None:
        for name in ("bandwidth", "neighbours", "chunk"):
            positive(name, getattr(self, name))
        _check_points("source", self.source)
        if self.source.shape != self.target.shape:
            raise ValueError(
                f"pairs need sources and targets of one shape, got {tuple(self.source.shape)} "
                f"and {tuple(self.target.shape)}"
            )

    def denoise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The smoothed mean of the targets whose pairs pass near the state."""
        _refuse(condition)
        state, time = x.double().flatten(1), t.double().unsqueeze(1)
        near = state.new_empty(len(state), 0)
        rows = torch.empty(len(state), 0, dtype=torch.int64, device=x.device)
        for begin in range(0, len(self.source), self.chunk):
            part = slice(begin, begin + self.chunk)
            distance = self._squared_distance(state, time, part)
            here = torch.arange(begin, begin + distance.shape[1], device=x.device)
            near = torch.cat([near, distance], 1)
            rows = torch.cat([rows, here.expand(len(state), -1)], 1)
            near, kept = near.topk(min(self.neighbours, near.shape[1]), dim=1, largest=False)
            rows = rows.gather(1, kept)
        weights = torch.softmax(-0.5 * near / self.bandwidth, dim=1)
        points = self.target.flatten(1)[rows.to(self.target.device)].to(state)
        mean = (weights.unsqueeze(1) @ points).squeeze(1)
        return mean.view_as(x).to(x.dtype)

    def _squared_distance(self, state: Tensor, time: Tensor, part: slice) -> Tensor:
        """`|x - x_i(t)|²` for every state and pair, by products that need no `(b, n, d)` array."""
        z = self.source[part].flatten(1).to(state)
        y = self.target[part].flatten(1).to(state)
        rest = 1 - time
        norms = (
            time.square() * y.square().sum(1)
            + rest.square() * z.square().sum(1)
            + 2 * time * rest * (z * y).sum(1)
        )
        cross = time * (state @ y.T) + rest * (state @ z.T)
        return state.square().sum(1, keepdim=True) + norms - 2 * cross


@dataclass(frozen=True, eq=False)
class GaussianField:
    """The exact field from standard normal noise to independent normal data, on any path.

    Everything about it is known (the map, the density at every time), which makes it the ruler of
    solvers, samplers and likelihoods. On straight lines the velocity is
    `m + (t s² - (1 - t)) / ((1 - t)² + t² s²) (x - t m)`, and the flow maps z to `m + s z`.

    Args:
        mean: m, of one sample's shape or broadcasting to it.
        std: s > 0, alike.
        path: the path; rectified by default.

    Raises:
        ValueError: a standard deviation that is not positive.

    Example:
        >>> field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
        >>> field.transport(torch.tensor([[1.0]]))
        tensor([[2.5000]])

    Source: arXiv 2209.03003, equation 1, with both ends Gaussian.
    """

    mean: Tensor
    std: Tensor
    path: Path = attribute(default_factory=RectifiedPath)

    def __post_init__(self) -> None:
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be > 0 everywhere, got {self.std.min().item()}")

    def _at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`alpha`, the centred state and the variance at time t."""
        alpha = self.path.alpha(t)
        variance = self.path.sigma(t).square() + (alpha * self.std.to(x)).square()
        return alpha, x - alpha * self.mean.to(x), variance

    def denoise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The mean of the data given the state."""
        _refuse(condition)
        alpha, centred, variance = self._at(x, expand(t, x))
        return self.mean.to(x) + alpha * self.std.to(x).square() / variance * centred

    def noise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The mean of the source given the state."""
        _refuse(condition)
        _, centred, variance = self._at(x, expand(t, x))
        return self.path.sigma(expand(t, x)) / variance * centred

    def velocity(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The mean of the path's derivative given the state."""
        data, noise = self.denoise(x, t, **condition), self.noise(x, t, **condition)
        return self.path.velocity(noise, data, t)

    def transport(
        self, x: Float[Tensor, "b *dims"], start: float = 0.0, stop: float = 1.0
    ) -> Float[Tensor, "b *dims"]:
        """Where the flow carries states from time `start` to time `stop`, exactly."""
        _, centred, before = self._at(x, x.new_tensor(start))
        alpha, _, after = self._at(x, x.new_tensor(stop))
        return alpha * self.mean.to(x) + (after / before).sqrt() * centred

    def log_density(self, x: Float[Tensor, "b *dims"], t: float = 1.0) -> Float[Tensor, " b"]:
        """The log-density (nats) of the states at time t."""
        _, centred, variance = self._at(x, x.new_tensor(t))
        terms = centred.square() / variance + (2 * math.pi * variance).log()
        return -0.5 * terms.expand_as(x).flatten(1).sum(1)


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim < 2 or not points.shape[0]:
        raise ValueError(f"{name} must hold points in rows (n, ...), got {tuple(points.shape)}")


def _refuse(condition: dict[str, Any]) -> None:
    if condition:
        raise ValueError(f"an analytic field takes no condition, got {', '.join(condition)}")
