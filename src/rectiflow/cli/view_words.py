"""Views and parts of pictures from words, for commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.guidance.views import View

Shape = tuple[int, int, int]
# Word: how it is written, and the degradation of `images.degradations` that it stands for.
PARTS: dict[str, tuple[str, Callable[..., str]]] = {
    "low": ("low[:STD]", lambda std="2": f"blur:{2 * _reach(std) + 1}:{std}"),
    "motion": ("motion[:LENGTH[:ANGLE]]", lambda length="9", angle="0": f"motion:{length}:{angle}"),
    "grey": ("grey", lambda: "grey"),
}
# The rest of another word, which holds its numbers.
RESTS = {"high": "low", "still": "motion", "colour": "grey"}


def views_of(words: Sequence[str], shape: Shape) -> list[View]:
    """The views of words, of which commas separate several.

    Besides those of `parse_view`: `low:STD` and `high:STD` (coarse form and fine detail), `grey`
    and `colour`, `motion:LENGTH:ANGLE` and `still:LENGTH:ANGLE`, and `share:WEIGHT`, which add up
    to a picture under `--combine sum`.

    Args:
        words: such as `["identity,flip"]`.
        shape: of a sample, `(channels, height, width)`.

    Raises:
        ValueError: an unknown word, a view that is not orthogonal, or one that does not fit.
    """
    from rectiflow.guidance.views import assert_orthogonal, parse_view

    found: list[View] = []
    for text in (part for word in words for part in word.split(",")):
        part = _part(text.strip(), shape)
        if part is None:
            part = parse_view(text)
            assert_orthogonal(part, shape)
        found.append(part)
    return found


def _part(text: str, shape: Shape) -> View | None:
    """The part of a word, if it is the word of one."""
    from rectiflow.guidance.views import Part, Rest

    word, *values = text.split(":")
    if word == "share":
        weight = _number(values, text)
        return Part(lambda x: weight * x)
    of = RESTS.get(word, word)
    if of not in PARTS:
        return None
    written, make = PARTS[of]
    if len(values) > written.count(":"):
        raise ValueError(f"the part {text!r} is not understood: write {written}")
    try:
        words = make(*values)
    except ValueError:
        raise ValueError(f"the part {text!r} is not understood: write {written}") from None
    part = Part(_filter(words, shape))
    return Rest(part) if word in RESTS else part


def _filter(words: str, shape: Shape) -> Callable[[Tensor], Tensor]:
    """A degradation that makes pictures of the same size, one grey channel standing for all."""
    from rectiflow.images.degradations import build

    operator = build(words, shape)
    return lambda x: operator.A(x).expand_as(x)


def _reach(std: str) -> int:
    """Pixels over which a Gaussian reaches."""
    positive("std", float(std))
    return max(1, round(2 * float(std)))


def _number(values: Sequence[str], text: str) -> float:
    try:
        (value,) = values
        return float(value)
    except ValueError:
        raise ValueError(f"the part {text!r} is not understood: write share:WEIGHT") from None
