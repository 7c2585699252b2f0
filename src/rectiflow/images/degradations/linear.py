"""Degradations of images, the linear ones with adjoint and norm, and their composition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor


class Degradation(ABC):
    """A map of images `(b, c, h, w)` to measurements, differentiable with respect to the images."""

    @abstractmethod
    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """The shape of one measurement of an image of shape `(c, h, w)`.

        Raises:
            ValueError: images of this shape cannot be measured.
        """

    @abstractmethod
    def _apply(self, images: Tensor) -> Tensor:
        """The measurements of images whose shape has been checked."""

    def A(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *measured"]:
        """The measurements of images, without noise.

        Raises:
            ValueError: images of a shape that cannot be measured.
        """
        if images.ndim != 4:
            raise ValueError(f"images must be (batch, c, h, w), got shape {tuple(images.shape)}")
        self.shape(images.shape[1:])
        return self._apply(images)

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b *measured"]:
        """The measurements of images, without noise."""
        return self.A(images)

    def observed(self, measured: Float[Tensor, "b *measured"]) -> Float[Tensor, "b *measured"]:
        """The measurements with zeros where this degradation never measures anything."""
        return measured

    def __matmul__(self, inner: Degradation) -> Degradation:
        """`outer @ inner`: first `inner`, then `outer`; linear if both are."""
        if isinstance(self, LinearOperator) and isinstance(inner, LinearOperator):
            return Composition(self, inner)
        return Chain(self, inner)


class LinearOperator(Degradation):
    """A linear degradation: `A`, its adjoint `AT` with `<A x, y> = <x, AT y>`, and its norm.

    Shapes are checked at every call. `norm` is exact where a closed form exists and an upper bound
    otherwise, so steps of `1 / norm²` are always short enough; `power_norm` estimates it.
    """

    @abstractmethod
    def _adjoint(self, measured: Tensor) -> Tensor:
        """The adjoint of measurements whose number of dimensions has been checked."""

    @abstractmethod
    def norm(self, image: Sequence[int]) -> float:
        """The largest factor, or an upper bound, by which images of a shape are lengthened."""

    def AT(self, measured: Float[Tensor, "b *measured"]) -> Float[Tensor, "b c h w"]:
        """The adjoint: measurements carried back to where they came from in the image.

        Raises:
            ValueError: measurements of a shape that this operator cannot make.
        """
        if measured.ndim != 4:
            raise ValueError(
                f"measurements must be (batch, c, h, w), got shape {tuple(measured.shape)}"
            )
        found = self._adjoint(measured)
        made = self.shape(found.shape[1:])
        if made != tuple(measured.shape[1:]):
            raise ValueError(
                f"measurements must have shape (batch, {', '.join(map(str, made))}), "
                f"got {tuple(measured.shape)}"
            )
        return found


@dataclass(frozen=True)
class Identity(LinearOperator):
    """The image itself.

    Example:
        >>> Identity().A(torch.ones(1, 1, 2, 2)).sum()
        tensor(4.)
    """

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        return tuple(image)

    def _apply(self, images: Tensor) -> Tensor:
        return images

    def _adjoint(self, measured: Tensor) -> Tensor:
        return measured

    def norm(self, image: Sequence[int]) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class Composition(LinearOperator):
    """Two linear operators one after the other: `A = outer inner`, `AT = innerT outerT`.

    Args:
        outer: what is applied last.
        inner: what is applied first.

    Example:
        >>> from rectiflow.images.degradations import Downscale, Grey
        >>> (Downscale(2) @ Grey()).shape((3, 8, 8))
        (1, 4, 4)
    """

    outer: LinearOperator
    inner: LinearOperator

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        return self.outer.shape(self.inner.shape(image))

    def _apply(self, images: Tensor) -> Tensor:
        return self.outer.A(self.inner.A(images))

    def _adjoint(self, measured: Tensor) -> Tensor:
        return self.inner.AT(self.outer.AT(measured))

    def norm(self, image: Sequence[int]) -> float:
        return self.inner.norm(image) * self.outer.norm(self.inner.shape(image))

    def observed(self, measured: Float[Tensor, "b *measured"]) -> Float[Tensor, "b *measured"]:
        return self.outer.observed(measured)


@dataclass(frozen=True, eq=False)
class Chain(Degradation):
    """Two degradations one after the other, of which one is not linear."""

    outer: Degradation
    inner: Degradation

    def shape(self, image: Sequence[int]) -> tuple[int, ...]:
        return self.outer.shape(self.inner.shape(image))

    def _apply(self, images: Tensor) -> Tensor:
        return self.outer.A(self.inner.A(images))

    def observed(self, measured: Float[Tensor, "b *measured"]) -> Float[Tensor, "b *measured"]:
        return self.outer.observed(measured)


def power_norm(
    operator: LinearOperator,
    image: Sequence[int],
    *,
    iterations: int = 50,
    generator: torch.Generator | None = None,
) -> float:
    """The norm of an operator by power iteration: an estimate from below.

    Use it where `norm` is only a bound and the step should be as long as possible.

    Args:
        operator: the operator.
        image: shape of one image, `(c, h, w)`.
        iterations: applications of `AT A`.
        generator: draws the first image.

    Example:
        >>> from rectiflow.images.degradations import Downscale
        >>> round(power_norm(Downscale(2), (1, 8, 8)), 4)
        0.5
    """
    x = torch.randn(1, *image, generator=generator, dtype=torch.float64)
    size = 0.0
    for _ in range(iterations):
        x = x / x.norm().clamp(min=1e-300)
        x = operator.AT(operator.A(x))
        size = float(x.norm())
    return size**0.5
