"""Mean and variance of the gradients that a batch's gradient is the mean of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed


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
    return sum(
        float(tensor.sum(dtype=None if tensor.device.type == "mps" else torch.float64))
        for tensor in tensors
    )


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
