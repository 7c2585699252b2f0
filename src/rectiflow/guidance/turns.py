"""Views that need no table of pixels: as it is, flipped, turned, negated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rectiflow.guidance.view import View

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Identity(View):
    """The picture as it is."""

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return x

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return x


@dataclass(frozen=True)
class Flip(View):
    """The picture upside down, or mirrored.

    Args:
        horizontal: exchange left and right in place of top and bottom.
    """

    horizontal: bool = False

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return x.flip(-1 if self.horizontal else -2)

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return self.apply(x)


@dataclass(frozen=True)
class Rotate(View):
    """The picture turned counter-clockwise by right angles.

    Args:
        degrees: 90, 180 or 270; quarter turns need square pictures.

    Raises:
        ValueError: another angle, whose pixels would have to be interpolated.
    """

    degrees: int = 90

    def __post_init__(self) -> None:
        if self.degrees not in (90, 180, 270):
            raise ValueError(
                f"a turn by {self.degrees:g} degrees is not orthogonal, as pixels between those of "
                "the grid would be interpolated: take 90, 180 or 270"
            )

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims i j"]:
        return x.rot90(self.degrees // 90, (-2, -1))

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims i j"]:
        return x.rot90(-(self.degrees // 90), (-2, -1))


@dataclass(frozen=True)
class Negate(View):
    """The picture with dark and light exchanged."""

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return -x

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        return -x

    @property
    def places(self) -> View:
        return Identity()
