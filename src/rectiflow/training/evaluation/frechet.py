"""The Fréchet distance between two sets of features, from their streamed moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and unbiased covariance of a set of feature vectors, in float64 on the CPU."""

    mean: Float[Tensor, "d"]
    covariance: Float[Tensor, "d d"]
    count: int

    @classmethod
    def of(cls, features: Tensor | Iterable[Tensor]) -> Moments:
        """Moments of one batch of features, or of an iterable of batches.

        Args:
            features: vectors of shape (b, d), or batches of them.

        Returns:
            their moments.

        Raises:
            ValueError: see `MomentAccumulator`.

        Example:
            >>> Moments.of(torch.tensor([[0., 0.], [2., 0.]])).mean
            tensor([1., 0.], dtype=torch.float64)
        """
        total = MomentAccumulator()
        for batch in [features] if isinstance(features, torch.Tensor) else features:
            total.update(batch)
        return total.moments()


class MomentAccumulator:
    """Mean and covariance of features that arrive in batches, and on several processes.

    Each batch is centred before its products are formed and joined by the pairwise update, so a
    large common offset costs no digits. Memory is d x d, whatever the number of samples.

    Example:
        >>> total = MomentAccumulator()
        >>> total.update(torch.tensor([[0.], [2.]]))
        >>> total.update(torch.tensor([[4.]]))
        >>> total.moments().covariance
        tensor([[4.]], dtype=torch.float64)

    Source:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self.scatter = torch.empty(0, 0, dtype=torch.float64)

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch of features.

        Args:
            features: one vector per sample; an empty batch changes nothing.

        Raises:
            ValueError: not 2-D, another width than before, or not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features must have shape (b, d), got {tuple(features.shape)}")
        values = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(values).all():
            raise ValueError("features hold NaN or infinity; check the images they come from")
        if len(values) == 0:
            return
        mean = values.mean(0)
        centred = values - mean
        self._join(len(values), mean, centred.T @ centred)

    def merge(self, other: MomentAccumulator) -> None:
        """Add everything another accumulator has seen.

        Args:
            other: an accumulator of features of the same width; it is not changed.

        Raises:
            ValueError: another width.
        """
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def moments(self) -> Moments:
        """The moments of what was added so far.

        Returns:
            mean, covariance divided by `count - 1`, and count.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return Moments(self.mean.clone(), self.scatter / (self.count - 1), self.count)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features have width {len(mean)}, before it was {len(self.mean)}")
        total = self.count + count
        shift = mean - self.mean
        self.scatter = self.scatter + scatter
        self.scatter += torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians with these moments.

    `|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr (C_a^{1/2} C_b C_a^{1/2})^{1/2}`: called FID
    when the features are Inception's. The last trace is the sum of the singular values of
    `C_a^{1/2} C_b^{1/2}`, which equals it and, unlike a square root of tiny eigenvalues, keeps full
    precision for singular covariances (constant pixels, fewer samples than dimensions). The
    distance of finite samples is biased upward: compare it with a train-vs-test floor of the same
    size.

    Args:
        a: moments of one set.
        b: moments of the other, same width.

    Returns:
        the distance, >= 0.

    Raises:
        ValueError: the widths differ.

    Example:
        >>> a = Moments(torch.zeros(2).double(), torch.eye(2).double(), 10)
        >>> b = Moments(torch.ones(2).double(), 4 * torch.eye(2).double(), 10)
        >>> round(frechet_distance(a, b), 6)
        4.0
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared")
    shift = (a.mean - b.mean).square().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    return max(0.0, float(shift + traces - 2 * cross))


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
