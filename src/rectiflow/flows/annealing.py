"""Pairs whose noise end fades from fresh noise to the teacher's own: a start for small students."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rectiflow.errors import PairStoreError, positive, unknown
from rectiflow.flows.couplings import Coupling, Draw, Pairs, innermost
from rectiflow.flows.pair_store import PairStore


class Schedule(Protocol):
    """How much of the source is fresh noise at a training step."""

    @property
    def ramp(self) -> float:
        """The number of steps after which no fresh noise is left; infinite if that never comes."""

    def __call__(self, step: int) -> float:
        """The share b in [0, 1] at a step."""


@dataclass(frozen=True)
class Linear:
    """`b = max(0, 1 - k / ramp)` at step k: the schedule of choice.

    Example:
        >>> [Linear(100)(step) for step in (0, 25, 100, 200)]
        [1.0, 0.75, 0.0, 0.0]

    Source: arXiv 2407.12718, section 3.1.
    """

    ramp: float = 300_000

    def __post_init__(self) -> None:
        positive("ramp", self.ramp)

    def __call__(self, step: int) -> float:
        return max(0.0, 1 - step / self.ramp)


@dataclass(frozen=True)
class Cosine:
    """`b = (1 + cos(pi min(1, k / ramp))) / 2`: slow at both ends.

    Example:
        >>> [round(Cosine(100)(step), 4) for step in (0, 25, 100)]
        [1.0, 0.8536, 0.0]

    Source: arXiv 2407.12718, the official code.
    """

    ramp: float = 300_000

    def __post_init__(self) -> None:
        positive("ramp", self.ramp)

    def __call__(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.ramp)))


@dataclass(frozen=True)
class Exponential:
    """`b = exp(-k / scale)`, which is never 0: for ablations.

    A model trained with it has always seen some fresh noise and is not quite a reflowed one.

    Example:
        >>> round(Exponential(100)(100), 4), Exponential(100).ramp
        (0.3679, inf)

    Source: arXiv 2407.12718, the official code.
    """

    scale: float = 300_000

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    @property
    def ramp(self) -> float:
        return math.inf

    def __call__(self, step: int) -> float:
        return math.exp(-step / self.scale)


@dataclass(frozen=True)
class Constant:
    """The same b at every step: 0 is plain reflow, 1 a first flow on the teacher's samples.

    Example:
        >>> Constant(0.0)(7), Constant(0.0).ramp, Constant(1.0).ramp
        (0.0, 0.0, inf)
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"the share of fresh noise must be in [0, 1], got {self.value}")

    @property
    def ramp(self) -> float:
        return math.inf if self.value else 0.0

    def __call__(self, step: int) -> float:
        return self.value


KINDS: dict[str, Any] = {
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "constant": Constant,
}
USUAL_SHARE = 0.375
"""The ramp's share of a training where none is given: 300,000 of 800,000 steps in the paper."""


def parse_schedule(text: str, steps: int) -> Schedule:
    """A schedule from a word, such as `linear:300000`, `cosine:25%` or `constant:0.5`.

    Args:
        text: linear, cosine or exponential with a number of steps or a share of the training
            (three eighths without either), or constant with its value.
        steps: the length of the training.

    Raises:
        ValueError: an unknown kind, or something that is no number.

    Example:
        >>> parse_schedule("linear", 800).ramp, parse_schedule("cosine:50%", 800).ramp
        (300.0, 400.0)
    """
    name, _, given = text.partition(":")
    if name not in KINDS:
        raise unknown("annealing schedule", name, KINDS)
    part = given.endswith("%")
    try:
        number = float(given.removesuffix("%")) if given else None
    except ValueError:
        raise ValueError(
            f"the schedule {name} takes a number of steps or a share such as 37.5%, got {given!r}"
        ) from None
    if name == "constant":
        value = number or 0.0
        return Constant(value / 100 if part else value)
    if number is None:
        number = USUAL_SHARE * steps
    elif part:
        number *= steps / 100
    return KINDS[name](number)


@dataclass(frozen=True)
class AnnealedPairs:
    """The pairs of another coupling with their sources mixed with fresh noise, less at every step.

    Use it to train a small network from random weights on the pairs of a big one. At b = 1 the
    pairs are independent (a first flow on the teacher's samples), at b = 0 they are the teacher's
    own (reflow, bit for bit); in between `sqrt(1 - b²) z + b z'` with z' drawn anew in every step.
    The mixture is standard normal for every b, so the marginals hold all the way; it is not for
    sources that are themselves data. Targets are never mixed.

    Args:
        coupling: paired noises and results: `StoredPairs` or `LivePairs`.
        schedule: b as a function of the training step.

    Raises:
        PairStoreError: the sources of a store are data, not noise.

    Example:
        >>> import torch
        >>> from rectiflow.flows.couplings import Independent
        >>> pairs = AnnealedPairs(Independent(torch.zeros(8, 2)), Linear(10))
        >>> pairs.draw(Draw.of(4, step=5)).source.shape
        torch.Size([4, 2])

    Source: arXiv 2407.12718, section 3.1 (annealing reflow).
    """

    coupling: Coupling
    schedule: Schedule = field(default_factory=Linear)

    def __post_init__(self) -> None:
        store = getattr(innermost(self.coupling), "store", None)
        if isinstance(store, PairStore) and store.settings.source != "normal":
            raise PairStoreError(
                f"{store.folder} has sources of the kind {store.settings.source!r}, and annealing "
                "mixes the source with fresh noise: use pairs that start from drawn noise"
            )

    def draw(self, draw: Draw) -> Pairs:
        pairs = self.coupling.draw(draw)
        share = self.schedule(draw.step)
        if share == 0:
            return pairs
        fresh = draw.normal(pairs.source.shape[1:]).to(pairs.source.dtype)
        mixed = math.sqrt(1 - share * share) * pairs.source + share * fresh
        return replace(pairs, source=mixed)
