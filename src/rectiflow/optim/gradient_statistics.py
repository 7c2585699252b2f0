"""Mean and variance of the gradients that a batch's gradient is the mean of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from rectiflow.errors import positive
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class GradientStatistics:
    """What is known of gradients whose mean is a batch's gradient, tensor by tensor.

    Squares are sums of squared deviations from the mean: no variance comes out of a difference of
    two large numbers.

    Attributes:
        count: number of gradients.
        unit: samples that each of them is a mean of; 1 for per-sample gradients.
        mean: their mean, plus what every one of them has in common (an offset).
        squares: sum of squared deviations: of each coordinate, or one number a tensor.
        inner: sum of squared deviations of their inner products with the mean: of the whole
            vectors first, then of each tensor's part; None where they were not looked at.
    """

    count: int
    unit: int
    mean: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]
    inner: Tensor | None = None

    @property
    def samples(self) -> int:
        """Samples looked at."""
        return self.count * self.unit

    @property
    def signal(self) -> float:
        """Squared norm of the mean."""
        return _total(mean.square() for mean in self.mean)

    @property
    def noise(self) -> float:
        """Sum over coordinates of the variance of a single sample's gradient, unbiased."""
        return self._per_sample * _total(self.squares)

    @property
    def along(self) -> float:
        """Variance of the inner product of a single sample's gradient with the mean."""
        return self._per_sample * float(self._inner[0])

    @property
    def along_tensors(self) -> float:
        """The same taken for each tensor apart and summed, without covariance between them."""
        return self._per_sample * float(self._inner[1:].sum())

    def variances(self) -> list[Tensor]:
        """Variance of a single sample's gradient: of each coordinate, or one number a tensor."""
        return [self._per_sample * squares for squares in self.squares]

    @property
    def _per_sample(self) -> float:
        if self.count < 2:
            raise ValueError(
                f"a variance needs two gradients or more, got {self.count}: test a larger batch, "
                "or accumulate over more micro-batches"
            )
        # A mean of `unit` samples varies `unit` times less than one.
        return self.unit / (self.count - 1)

    @property
    def _inner(self) -> Tensor:
        if self.inner is None:
            raise ValueError(
                "inner products were not looked at: ask for statistics with inner=True"
            )
        return self.inner

    def merged(self, other: GradientStatistics) -> GradientStatistics:
        """Statistics of both sets of gradients together, exactly (Chan's formula).

        Inner products are left out: they belong to each set's own mean.
        """
        count = self.count + other.count
        weight = self.count * other.count / count
        gaps = [theirs - mine for mine, theirs in zip(self.mean, other.mean)]
        return replace(
            self,
            count=count,
            mean=tuple(m + gap * (other.count / count) for m, gap in zip(self.mean, gaps)),
            squares=tuple(
                a + b + weight * _like(gap.square(), a)
                for a, b, gap in zip(self.squares, other.squares, gaps)
            ),
            inner=None,
        )

    def pooled(self) -> GradientStatistics:
        """Statistics of the gradients of all processes together; each has to call it.

        `sum_j [squares_j + n_j (mean_j - mean)²]`, without inner products. Alone, as it is.
        """
        if not several():
            return self
        like = self.mean[0]
        count = _summed([like.new_tensor(float(self.count))])[0]
        mean = [total / count for total in _summed([m * self.count for m in self.mean])]
        squares = _summed(
            [
                own + self.count * _like((m - whole).square(), own)
                for own, m, whole in zip(self.squares, self.mean, mean)
            ]
        )
        return replace(self, count=int(count), mean=tuple(mean), squares=tuple(squares), inner=None)


def _total(tensors: Iterable[Tensor]) -> float:
    """The sum of everything, accumulated in float64 where the device has it."""
    return sum(float(tensor.sum()) for tensor in tensors)


def _like(squares: Tensor, kept: Tensor) -> Tensor:
    """Squares by coordinate, summed where one number a tensor is kept."""
    return squares if squares.shape == kept.shape else squares.sum()


def several() -> bool:
    """Whether there are other processes."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over all processes, in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def inner_squares(products: Tensor) -> Tensor:
    """Sums over gradients, and processes, of squared inner products `(tensors, gradients)`.

    The gradients are centred, and so are the products.
    """
    squares = torch.cat([products.sum(0, keepdim=True), products]).square().sum(1)
    return _summed([squares])[0] if several() else squares


class MicroBatchStatistics:
    """Statistics of the gradients of micro-batches, taken while they accumulate.

    Nearly free where gradients are accumulated anyway: one copy of the gradients. Inner products
    would need all of them at once and are not looked at.

    Args:
        params: the weights.
        unit: samples of a micro-batch.
        times: the factor by which each loss was divided before its backward pass.
        coordinates: keep squares by coordinate, at one more copy.

    Raises:
        ValueError: a unit or factor that is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> watch = MicroBatchStatistics([weight], unit=2, times=2)
        >>> for x in (1.0, 3.0):
        ...     (weight * x / 2).sum().backward()
        ...     watch.observe()
        >>> found = watch.statistics()
        >>> found.signal, found.noise
        (4.0, 4.0)

    Source: the estimator of arXiv 2412.21124, for accumulation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        unit: int,
        times: float = 1.0,
        coordinates: bool = False,
    ) -> None:
        positive("unit", unit)
        positive("times", times)
        self.params = [p for p in params if p.requires_grad]
        self.unit, self.times, self.coordinates = unit, times, coordinates
        self._before: list[Tensor] | None = None
        self._found: GradientStatistics | None = None

    @torch.no_grad()
    def observe(self) -> None:
        """Take what the last backward pass added to the gradients."""
        now = [_gradient(p) for p in self.params]
        before = self._before
        own = [g.clone() for g in now] if before is None else [g - b for g, b in zip(now, before)]
        one = single([g.mul_(self.times) for g in own], self.unit, coordinates=self.coordinates)
        self._found = one if self._found is None else self._found.merged(one)
        self._before = [g.clone() for g in now]

    def statistics(self) -> GradientStatistics:
        """What was seen since the last call, over all processes; the next step begins anew.

        Raises:
            ValueError: nothing was observed.
        """
        if self._found is None:
            raise ValueError("nothing was observed: call observe() after each backward pass")
        found, self._found, self._before = self._found, None, None
        return found.pooled()


def _gradient(p: Any) -> Tensor:
    """A weight's gradient in float32 at least, zeros where it has none."""
    return wide(p.grad if p.grad is not None else torch.zeros_like(p))


def single(
    gradients: Sequence[Float[Tensor, "..."]], unit: int, *, coordinates: bool = False
) -> GradientStatistics:
    """One gradient as statistics, to be merged or pooled with others.

    Args:
        gradients: its tensors.
        unit: samples that it is a mean of.
        coordinates: keep squares by coordinate.
    """
    mean = tuple(wide(g) for g in gradients)
    squares = tuple(torch.zeros_like(g) if coordinates else g.new_zeros(()) for g in mean)
    return GradientStatistics(1, unit, mean, squares)


@torch.no_grad()
def rank_statistics(
    gradients: Sequence[Float[Tensor, "..."]],
    unit: int,
    *,
    inner: bool = False,
    coordinates: bool = False,
) -> GradientStatistics:
    """Statistics of the gradients of processes, before they are averaged; each has to call it.

    The cheapest estimate, and with few processes the roughest.

    Args:
        gradients: this process's own gradient, tensor by tensor.
        unit: samples that it is a mean of.
        inner: look at the inner products with the mean, too.
        coordinates: keep squares by coordinate.

    Returns:
        the statistics.

    Source: arXiv 2412.21124: the variance between processes, times the samples of one.
    """
    own = single(gradients, unit, coordinates=coordinates)
    found = own.pooled()
    if not inner:
        return found
    products = [((g - m) * m).sum() for g, m in zip(own.mean, found.mean)]
    return replace(found, inner=inner_squares(torch.stack(products)[:, None]))
