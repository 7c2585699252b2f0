"""Gradient statistics of micro-batches and of processes, without gradients of single samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.optim.gradient_statistics import GradientStatistics, inner_squares
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


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
