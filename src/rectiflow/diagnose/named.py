"""Diagnoses by name, as commands take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rectiflow.diagnose.opposing_signals import OpposingSignals
from rectiflow.diagnose.probes import Probe
from rectiflow.diagnose.scale_invariance import ScaleInvariance
from rectiflow.diagnose.sharpness import Sharpness
from rectiflow.diagnose.watch import Diagnosis
from rectiflow.diagnose.win_rate import WinRate
from rectiflow.errors import unknown

DIAGNOSES = (OpposingSignals.name, ScaleInvariance.name, Sharpness.name, WinRate.name)


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
    names: Sequence[str],
    probe: Probe,
    *,
    every: int = 100,
    batch_size: int | None = None,
    optimizer: Any = None,
    seed: int = 0,
) -> list[Diagnosis]:
    """Diagnoses of a training by name.

    Args:
        names: see `DIAGNOSES`.
        probe: the samples they look at, such as `FlowProbe.of(method)`.
        every: steps between looks.
        batch_size: samples of the probe at once; all by default.
        optimizer: the optimizer of the training, for `win-rate`.
        seed: of what they draw.

    Raises:
        ValueError: an unknown name; `win-rate` for an optimizer without one.
    """
    some: dict[str, Any] = {"every": every, "batch_size": batch_size, "seed": seed}
    makers = {
        OpposingSignals.name: lambda: OpposingSignals(probe, **some),
        ScaleInvariance.name: lambda: ScaleInvariance(probe, every=every),
        Sharpness.name: lambda: Sharpness(probe, **some),
        WinRate.name: lambda: WinRate(optimizer, every=every),
    }
    for name in names:
        if name not in makers:
            raise unknown("diagnosis", name, makers)
    return [makers[name]() for name in names]
