"""Diagnoses by name, as commands take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from rectiflow.diagnose.friction_weights import FrictionWeights
from rectiflow.diagnose.opposing_signals import OpposingSignals
from rectiflow.diagnose.probes import FlowProbe
from rectiflow.diagnose.scale_invariance import ScaleInvariance
from rectiflow.diagnose.sharpness import Sharpness
from rectiflow.diagnose.watch import Diagnosis
from rectiflow.diagnose.win_rate import WinRate
from rectiflow.errors import unknown


@dataclass(frozen=True)
class Entry:
    """A diagnosis that has a name.

    Attributes:
        make: builds it from a function that gives the probe, steps between looks, and samples of
            the probe at once.
        system: the published system it belongs to, for citations.
    """

    make: Callable[[Callable[[], FlowProbe], int, int | None], Diagnosis]
    system: str


DIAGNOSES = {
    "friction": Entry(lambda probe, every, size: FrictionWeights(every=every), "diffgrad"),
    "opposing-signals": Entry(
        lambda probe, every, size: OpposingSignals(probe(), every=every, batch_size=size),
        "opposing-signals",
    ),
    "scale-invariance": Entry(
        lambda probe, every, size: ScaleInvariance(probe(), every=every, batch_size=size),
        "adamp",
    ),
    "sharpness": Entry(
        lambda probe, every, size: Sharpness(probe(), every=every, batch_size=size),
        "coordinate-clipping",
    ),
    "win-rate": Entry(lambda probe, every, size: WinRate(every=every), "sophia"),
}


def parse_diagnoses(text: str) -> tuple[str, ...]:
    """Names out of a list such as `sharpness,opposing-signals`.

    Raises:
        ValueError: an unknown name, or one twice.

    Example:
        >>> parse_diagnoses("sharpness, opposing-signals")
        ('sharpness', 'opposing-signals')
        >>> parse_diagnoses("")
        ()
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in DIAGNOSES:
            raise unknown("diagnosis", name, DIAGNOSES)
        if names.count(name) > 1:
            raise ValueError(f"the diagnosis {name!r} is named twice: name it once")
    return names


def diagnoses(
    names: str,
    method: Any,
    *,
    every: int = 100,
    count: int = 256,
    batch_size: int | None = None,
) -> list[Diagnosis]:
    """Diagnoses of a training by name, all on one probe.

    Args:
        names: names of `DIAGNOSES` with commas between.
        method: what is trained.
        every: steps between looks.
        count: samples of the probe.
        batch_size: samples of the probe at once; all by default.

    Raises:
        ValueError: an unknown name; a method that has no `FlowProbe`, where one is needed.
    """
    probe = cache(lambda: FlowProbe(method, count))
    return [DIAGNOSES[name].make(probe, every, batch_size) for name in parse_diagnoses(names)]
