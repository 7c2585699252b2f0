"""Every view, and views from words such as `flip`, `rotate:90`, `jigsaw:3` or `flip+negate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectiflow.errors import unknown
from rectiflow.guidance.parts import Part, Rest
from rectiflow.guidance.permutations import (
    InnerCircle,
    Jigsaw,
    PatchPermute,
    Permutation,
    PixelPermute,
    Skew,
    SquareHinge,
)
from rectiflow.guidance.turns import Flip, Identity, Negate, Rotate
from rectiflow.guidance.view import (
    Composed,
    View,
    assert_orthogonal,
    compose,
    inverse_with_variance,
)

__all__ = [
    "VIEWS",
    "Composed",
    "Flip",
    "Identity",
    "InnerCircle",
    "Jigsaw",
    "Negate",
    "Part",
    "PatchPermute",
    "Permutation",
    "PixelPermute",
    "Rest",
    "Rotate",
    "Skew",
    "SquareHinge",
    "View",
    "assert_orthogonal",
    "compose",
    "inverse_with_variance",
    "parse_view",
]


def _degrees(text: str) -> float:
    """A number, whole where it can be."""
    value = float(text)
    return int(value) if value.is_integer() else value


# Word: the class, how it is written, and the types of its numbers in order.
VIEWS: dict[str, tuple[Callable[..., View], str, tuple[Callable[[str], Any], ...]]] = {
    "identity": (Identity, "identity", ()),
    "flip": (Flip, "flip", ()),
    "mirror": (lambda: Flip(horizontal=True), "mirror", ()),
    "rotate": (Rotate, "rotate[:DEGREES]", (_degrees,)),
    "negate": (Negate, "negate", ()),
    "skew": (Skew, "skew[:FACTOR]", (float,)),
    "patch-permute": (PatchPermute, "patch-permute[:PATCHES[:SEED]]", (int, int)),
    "pixel-permute": (PixelPermute, "pixel-permute[:SEED]", (int,)),
    "jigsaw": (Jigsaw, "jigsaw[:SEED]", (int,)),
    "inner-circle": (InnerCircle, "inner-circle[:DEGREES[:RADIUS]]", (_degrees, float)),
    "square-hinge": (SquareHinge, "square-hinge[:SQUARES]", (int,)),
}
OTHERWISE = {
    "rotate-cw": "rotate:270",
    "rotate-ccw": "rotate:90",
    "rotate-90": "rotate:90",
    "rotate-180": "rotate:180",
    "rotate-270": "rotate:270",
}
# What people try, and why it cannot be asked about.
NOT_ORTHOGONAL = {
    "blur": "what it takes away cannot be brought back",
    "brightness": "it is not linear",
    "crop": "what it takes away cannot be brought back",
    "resize": "it changes the variance of noise",
    "white-balance": "it changes the variance of noise",
    "zoom": "what it takes away cannot be brought back",
}


def parse_view(text: str) -> View:
    """The view of a word, or of several joined by `+` and applied from left to right.

    Underscores stand for dashes. `rotate-cw`, `rotate-ccw` and `rotate-180` are turns too.

    Args:
        text: identity, flip, mirror, rotate:DEGREES, negate, skew:FACTOR,
            patch-permute:PATCHES:SEED, pixel-permute:SEED, jigsaw:SEED,
            inner-circle:DEGREES:RADIUS or square-hinge:SQUARES; numbers have defaults.

    Raises:
        ValueError: an unknown word (the closest is suggested), one of a view that is not
            orthogonal, or numbers that do not belong to it.

    Example:
        >>> parse_view("rotate:180"), parse_view("flip+negate").parts
        (Rotate(degrees=180), (Flip(horizontal=False), Negate()))
    """
    return compose(*(_one(part.strip().replace("_", "-")) for part in text.split("+")))


def _one(text: str) -> View:
    word, *values = OTHERWISE.get(text, text).split(":")
    if word in NOT_ORTHOGONAL:
        raise ValueError(
            f"the view {word!r} is not orthogonal ({NOT_ORTHOGONAL[word]}), so noise seen in it "
            f"would not be noise: take one of {', '.join(VIEWS)}"
        )
    if word not in VIEWS:
        raise unknown("view", word, [*VIEWS, *OTHERWISE])
    make, written, kinds = VIEWS[word]
    if len(values) > len(kinds):
        raise ValueError(f"the view {text!r} is not understood: write {written}")
    try:
        numbers = [kind(value) for kind, value in zip(kinds, values)]
    except ValueError:
        raise ValueError(f"the view {text!r} is not understood: write {written}") from None
    return make(*numbers)
