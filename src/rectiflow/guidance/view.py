"""What a view of a picture is: a linear map that keeps noise noise, and has an inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class View(ABC):
    """A linear map of the last two dimensions of any tensor, `(..., height, width)`.

    A flow can be asked about a view of its state if the view turns standard normal noise into
    standard normal noise and a mixture `alpha data + sigma noise` into the mixture of their views:
    it must be orthogonal, which `assert_orthogonal` checks. Turning, flipping, moving pixels about
    and negating them are; blurs, zooms and turns by other angles than right ones are not.

    A view of your own has the two methods; `places` only if it changes signs.
    """

    @abstractmethod
    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        """What is seen."""

    @abstractmethod
    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        """What was seen, from what is seen."""

    @property
    def places(self) -> View:
        """The same view without changes of sign, for maps of attention and predicted variances."""
        return self


@dataclass(frozen=True)
class Composed(View):
    """Views one after the other.

    Args:
        parts: the first is applied first.
    """

    parts: tuple[View, ...]

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        for part in self.parts:
            x = part.apply(x)
        return x

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        for part in reversed(self.parts):
            x = part.inverse(x)
        return x

    @property
    def places(self) -> View:
        return Composed(tuple(part.places for part in self.parts))


def compose(*views: View) -> View:
    """Views one after the other as one view; the first is applied first.

    Example:
        >>> from rectiflow.guidance.views import Flip, Negate
        >>> compose(Flip(), Negate()).apply(torch.tensor([[[1.0], [2.0]]])).flatten()
        tensor([-2., -1.])
    """
    return views[0] if len(views) == 1 else Composed(views)


def assert_orthogonal(view: View, shape: Sequence[int], *, tolerance: float = 1e-6) -> None:
    """Raise ValueError unless a view keeps lengths and angles of samples and can be undone.

    Two random samples are looked at in double precision: their inner product and lengths, a
    difference of them, their shape, and whether the inverse brings them back.

    Args:
        view: anything with `apply` and `inverse`.
        shape: of one sample, such as `(channels, height, width)`.
        tolerance: relative error that is allowed.

    Raises:
        ValueError: the view is not orthogonal on samples of this shape; says what it changes.

    Example:
        >>> from rectiflow.guidance.views import Rotate
        >>> assert_orthogonal(Rotate(90), (1, 4, 4))
        >>> assert_orthogonal(Rotate(90), (1, 4, 6))
        Traceback (most recent call last):
        ValueError: the view Rotate is not orthogonal: it makes 6x4 of 4x6; ...
    """
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, *shape, generator=draw, dtype=torch.float64)
    seen = view.apply(x), view.apply(y)
    fault = ""
    if seen[0].shape != x.shape:
        made, given = ("x".join(map(str, v.shape[-2:])) for v in (seen[0], x))
        fault = f"it makes {made} of {given}"
    elif not _close(view.inverse(seen[0]), x, tolerance):
        fault = "its inverse does not bring back what it was given"
    elif not _close(view.apply(2 * x - y), 2 * seen[0] - seen[1], tolerance):
        fault = "it is not linear"
    else:
        pairs = ((x, x), (y, y), (x, y))
        turned = ((seen[0], seen[0]), (seen[1], seen[1]), seen)
        for (a, b), (c, d) in zip(pairs, turned):
            before, after = float((a * b).sum()), float((c * d).sum())
            if abs(before - after) > tolerance * float((a.norm() * b.norm()).clamp(min=1)):
                fault = f"it makes an inner product of {before:.4g} one of {after:.4g}"
    if fault:
        raise ValueError(
            f"the view {type(view).__name__} is not orthogonal: {fault}; take one that only moves "
            "values or changes their signs, such as a flip, a right turn or a permutation"
        )


def inverse_with_variance(
    view: View, output: Float[Tensor, "b channels h w"]
) -> Float[Tensor, "b channels h w"]:
    """The output of a network that also predicts variances, brought back from a view.

    Such networks (DeepFloyd IF) have twice the channels of the data: noises, then variances. Both
    move with the view, but a variance has no sign to change: a negation leaves it as it is.
    Combine the variances of several views by their weights, without rectification.

    Args:
        view: the view in which the network was asked.
        output: noises and variances, stacked along the channels.

    Raises:
        ValueError: an odd number of channels.

    Example:
        >>> from rectiflow.guidance.views import Negate
        >>> inverse_with_variance(Negate(), torch.ones(1, 2, 1, 1)).flatten()
        tensor([-1.,  1.])

    Source: the released code of arXiv 2311.17919.
    """
    if output.shape[1] % 2:
        raise ValueError(
            f"noises and variances need an even number of channels, got {output.shape[1]}"
        )
    noise, variance = output.chunk(2, 1)
    return torch.cat([view.inverse(noise), view.places.inverse(variance)], 1)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool(
        (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)
    )
