"""One-sentence errors: what came, what is accepted, what to do."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class ModelFolderError(ValueError):
    """A model folder is incomplete, damaged, unsafe or made for something else."""


class PairStoreError(ValueError):
    """A folder of pairs is incomplete, damaged or made for something else."""


class PairQualityError(ValueError):
    """Generated pairs are too inaccurate to train on."""


class NonFiniteLossError(RuntimeError):
    """Training met a loss that is not a finite number."""


class SteeringDivergedError(ValueError):
    """Steering made the cost of a sample grow instead of fall."""


class RunExistsError(FileExistsError):
    """An output folder already holds a run."""


class BeyondDistilledStepsWarning(UserWarning):
    """A distilled model takes more steps than it was made for."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table, with the closest match.

    Example:
        >>> str(unknown("solver", "huen", ["euler", "heun"]))
        "unknown solver 'huen': did you mean 'heun'? (available: euler, heun)"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {given!r}{hint} (available: {', '.join(names)})")


def require(extra: str, *modules: str) -> None:
    """Raise `MissingExtraError` naming the extra if one of the modules cannot be imported."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)} is not installed: pip install 'rectiflow[{extra}]'"
        )


def positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ValueError unless `value` is positive (or zero, where allowed)."""
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{name} must be {'>= 0' if zero else '> 0'}, got {value}")
