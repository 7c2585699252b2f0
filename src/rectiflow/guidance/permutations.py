"""Views that move pixels to other places: skewed, shuffled, cut into pieces that turn."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import positive
from rectiflow.guidance.view import View

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Permutation(View):
    """A view given by the place from which each pixel comes."""

    @abstractmethod
    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        """The view of a picture of numbered places.

        Raises:
            ValueError: pictures of this size cannot be seen so.
        """

    def apply(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        forward, _ = _orders(self, *x.shape[-2:], x.device)
        return x.flatten(-2)[..., forward].view_as(x)

    def inverse(self, x: Float[Tensor, "*dims h w"]) -> Float[Tensor, "*dims h w"]:
        _, backward = _orders(self, *x.shape[-2:], x.device)
        return x.flatten(-2)[..., backward].view_as(x)


@functools.lru_cache(maxsize=64)
def _orders(
    view: Permutation, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the pixels of a view come from, and where those of the picture went."""
    # Kept for later calls, which may need gradients.
    with torch.inference_mode(False):
        places = torch.arange(height * width).view(height, width)
        forward = view.sources(places).flatten()
        return forward.to(device), forward.argsort().to(device)


@dataclass(frozen=True)
class Skew(Permutation):
    """Every column rolled down, the further from the middle the more, round the border.

    Args:
        factor: pixels per column; cut toward zero to whole pixels, so that the negative factor is
            the inverse.
    """

    factor: float = 1.5

    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        height, width = places.shape
        rolled = (self.factor * (torch.arange(width) - width / 2)).trunc().long()
        rows = (torch.arange(height)[:, None] - rolled) % height
        return places.gather(0, rows)


@dataclass(frozen=True)
class PatchPermute(Permutation):
    """Square patches in a random order.

    Args:
        patches: patches along a side.
        seed: of the order.

    Raises:
        ValueError: no patches; (when applied) sides that cannot be cut into so many.
    """

    patches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        positive("patches", self.patches)

    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        cut = _cut(places, self.patches, "patches")
        generator = torch.Generator().manual_seed(self.seed)
        mixed = cut.flatten(0, 1)[torch.randperm(self.patches**2, generator=generator)]
        return _join(mixed.view_as(cut))


@dataclass(frozen=True)
class PixelPermute(Permutation):
    """Pixels in a random order.

    Args:
        seed: of the order.
    """

    seed: int = 0

    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        generator = torch.Generator().manual_seed(self.seed)
        return places.flatten()[torch.randperm(places.numel(), generator=generator)].view_as(places)


@dataclass(frozen=True)
class InnerCircle(Permutation):
    """A disc about the middle turned, the rest left as it is.

    Args:
        degrees: 90, 180 or 270; quarter turns need square pictures.
        radius: of the disc, as a share of the shorter side.

    Raises:
        ValueError: another angle, or a radius outside (0, 0.5].
    """

    degrees: int = 180
    radius: float = 0.375

    def __post_init__(self) -> None:
        if self.degrees not in (90, 180, 270):
            raise ValueError(
                f"a disc turned by {self.degrees:g} degrees is not orthogonal, as pixels between "
                "those of the grid would be interpolated: take 90, 180 or 270"
            )
        if not 0 < self.radius <= 0.5:
            raise ValueError(f"radius must be in (0, 0.5], got {self.radius}")

    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        height, width = places.shape
        if self.degrees != 180:
            _square(places, "a quarter turn of a disc")
        rows, columns = _centred(height)[:, None], _centred(width)
        inside = rows.square() + columns.square() < (self.radius * min(height, width)) ** 2
        return torch.where(inside, places.rot90(self.degrees // 90), places)


@dataclass(frozen=True)
class SquareHinge(Permutation):
    """Squares turned by a quarter, neighbours in opposite directions, as if hinged.

    Args:
        squares: squares along a side.

    Raises:
        ValueError: no squares; (when applied) a picture that cannot be cut into so many squares.
    """

    squares: int = 4

    def __post_init__(self) -> None:
        positive("squares", self.squares)

    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        _square(places, "hinged squares")
        cut = _cut(places, self.squares, "squares")
        number = torch.arange(self.squares)
        odd = ((number[:, None] + number) % 2).bool()[..., None, None]
        return _join(torch.where(odd, cut.rot90(-1, (2, 3)), cut.rot90(1, (2, 3))))


@dataclass(frozen=True)
class Jigsaw(Permutation):
    """Sixteen pieces of a puzzle, with tabs, each put in the place of another that it fits.

    The puzzle looks the same after a quarter turn, so its pieces come in four groups of four that
    are copies of each other: corners, two kinds of edges, and inner ones. Within each group the
    pieces change places, turned as they must be to fit.

    Args:
        seed: of the tabs and the places.

    Raises:
        ValueError: (when applied) pictures that are not square with sides in multiples of four.
    """

    seed: int = 0

    def sources(self, places: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
        _square(places, "a jigsaw")
        _cut(places, 4, "pieces")
        generator = torch.Generator().manual_seed(self.seed)
        owner, found = _pieces(len(places), generator), places
        for first in (0, 1, 2, 5):
            for turn, target in enumerate(torch.randperm(4, generator=generator).tolist()):
                here = owner == _turned(first, target)
                found = torch.where(here, places.rot90(target - turn), found)
        return found


# A border of each group of four, as the cells above and below it; turns give the others.
BORDERS = ((0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (5, 9))


def _pieces(side: int, generator: torch.Generator) -> Tensor:
    """The piece that each pixel belongs to, by the number of its cell, row by row."""
    step = side // 4
    cell = torch.arange(side) // step
    owner = 4 * cell[:, None] + cell
    across = (torch.arange(side) + 0.5) / step
    for above, below in BORDERS:
        down = bool(torch.randint(2, (1,), generator=generator))
        # A disc whose middle lies a little beyond the border, so that it has a neck.
        rows = across[:, None] - below // 4 - (0.14 if down else -0.14)
        columns = across - below % 4 - 0.5
        tab = rows.square() + columns.square() < 0.21**2
        for turn in range(4):
            piece = _turned(above if down else below, turn)
            owner = torch.where(tab.rot90(turn), piece, owner)
    return owner


def _turned(cell: int, turn: int) -> int:
    """The cell of four by four in whose place a number of quarter turns puts a cell."""
    cells = torch.arange(16).view(4, 4)
    return int(cells[(cells == cell).rot90(turn)])


def _centred(side: int) -> Tensor:
    return torch.arange(side) - (side - 1) / 2


def _square(places: Tensor, what: str) -> None:
    height, width = places.shape
    if height != width:
        raise ValueError(f"{what} needs square pictures, got {height}x{width}")


def _cut(places: Tensor, count: int, what: str) -> Tensor:
    """Blocks, `(rows, columns, height, width)`."""
    height, width = places.shape
    if height % count or width % count:
        raise ValueError(
            f"a picture of {height}x{width} cannot be cut into {count}x{count} {what}: take a "
            "number that divides its sides"
        )
    return places.unflatten(1, (count, -1)).unflatten(0, (count, -1)).transpose(1, 2)


def _join(blocks: Tensor) -> Tensor:
    return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)
