"""Time samplers and premetrics from words, such as `logit-normal:0:1` or `pseudo-huber:0.03`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rectiflow.errors import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rectiflow.flows.premetrics import Premetric
    from rectiflow.flows.times import TimeSampler


@dataclass(frozen=True)
class Spec:
    """What a word stands for.

    Attributes:
        name: a class, or a function that makes one, of `rectiflow.flows`.
        numbers: what the numbers after the word mean, in the order of its arguments.
        listed: whether it takes its numbers as one tuple.
    """

    name: str
    numbers: str = ""
    listed: bool = False

    @property
    def made(self) -> Any:
        """The class, or None where this installation has no such class."""
        return getattr(import_module("rectiflow.flows"), self.name, None)


TIMES: dict[str, Spec] = {
    "uniform": Spec("Uniform", "low:high"),
    "discrete": Spec("Discrete", "t:t:...", listed=True),
    "u-shaped": Spec("UShaped", "a"),
    "logit-normal": Spec("LogitNormal", "mean:std"),
    "mode": Spec("Mode", "scale"),
    "cosmap": Spec("CosMap"),
    "toward-noise": Spec("TowardNoise", "strength"),
}
PREMETRICS: dict[str, Spec] = {
    "l2": Spec("L2"),
    "root-mean-square": Spec("RootMeanSquare"),
    "pseudo-huber": Spec("PseudoHuber", "c"),
    "noise-l2": Spec("NoiseL2"),
    "data-pseudo-huber": Spec("DataPseudoHuber", "c"),
}


def names(table: Mapping[str, Spec]) -> list[str]:
    """The words of a table that this installation can make.

    Example:
        >>> names(PREMETRICS)[:2]
        ['l2', 'root-mean-square']
    """
    return [word for word, spec in table.items() if spec.made is not None]


def parse_times(text: str) -> TimeSampler:
    """The time sampler of a word.

    Args:
        text: `uniform`, `uniform:LOW:HIGH`, `discrete:T:T`, `u-shaped:A`, `logit-normal:MEAN:STD`,
            `mode:SCALE`, `cosmap`, `toward-noise`; numbers left out take their defaults.

    Raises:
        ValueError: an unknown word, or numbers that do not belong to it.

    Example:
        >>> parse_times("uniform:0.1:0.9")
        Uniform(low=0.1, high=0.9)
    """
    return _parse("time sampler", text, TIMES)


def parse_premetric(text: str) -> Premetric:
    """The premetric of a word: `l2`, `root-mean-square`, `pseudo-huber` or `pseudo-huber:C`.

    Raises:
        ValueError: an unknown word, or numbers that do not belong to it.

    Example:
        >>> parse_premetric("pseudo-huber:0.03")
        PseudoHuber(c=0.03)
    """
    return _parse("premetric", text, PREMETRICS)


def _parse(kind: str, text: str, table: Mapping[str, Spec]) -> Any:
    word, *given = text.split(":")
    if word not in names(table):
        raise unknown(kind, word, names(table))
    spec = table[word]
    most = len(spec.numbers.split(":")) if spec.numbers else 0
    accepted = f"{word}:{spec.numbers}" if spec.numbers else f"{word} alone"
    try:
        numbers = [float(one) for one in given]
    except ValueError:
        raise ValueError(f"the {kind} {text!r} is not understood: it takes {accepted}") from None
    if spec.listed:
        return spec.made(tuple(numbers))
    if len(numbers) > most:
        raise ValueError(f"the {kind} {text!r} has too many numbers: it takes {accepted}")
    return spec.made(*numbers)
