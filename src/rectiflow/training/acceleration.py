"""Accelerate for a training: devices, precision, trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_accelerator(precision: str, tracker: str, folder: Path | None) -> Any:
    """An `accelerate.Accelerator` that tracks into the folder, if there is one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    state = AcceleratorState._shared_state
    if state and state["_mixed_precision"] != precision:
        # Accelerate keeps the precision of a process's first training for all others.
        AcceleratorState._reset_state()
    tracked = tracker != "none" and folder is not None
    return Accelerator(
        mixed_precision=precision,
        log_with=tracker if tracked else None,
        project_dir=str(folder) if tracked else None,
    )


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one level, for trackers."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = (
                value if isinstance(value, int | float | str | bool) else str(value)
            )
    return found
