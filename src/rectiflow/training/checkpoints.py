"""Training checkpoints: whole or absent, the newest readable one wins."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from rectiflow.files import atomic_path

NAME = re.compile(r"step-(\d{8})\.pt")
PART = re.compile(rf"\.{NAME.pattern}\..+")
"""Name of a file that was being written."""


def list_checkpoints(folder: Path | str) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint in a folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = ((NAME.fullmatch(p.name), p) for p in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def write(folder: Path | str, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of a step and remove all but the newest `keep` up to it.

    The others go only after the new one is on disk: a full disk or a kill leaves them intact.
    Those of later steps are of an earlier training and go too.

    Raises:
        OSError: the disk refused the file; earlier checkpoints are untouched.
    """
    target = Path(folder) / f"step-{step:08d}.pt"
    try:
        with atomic_path(target) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        kept = list_checkpoints(folder)
        last = f"the one of step {kept[-1][0]} is intact" if kept else "there is none before it"
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); {last}: "
            "free some space and resume"
        ) from error
    found = list_checkpoints(folder)
    newest = [path for number, path in found if number <= step][-keep:]
    for _, path in found:
        if path not in newest:
            path.unlink(missing_ok=True)
    return target


def clear(folder: Path | str) -> None:
    """Remove all checkpoints of a folder."""
    for _, path in list_checkpoints(folder):
        path.unlink(missing_ok=True)


def sweep(folder: Path | str) -> None:
    """Remove what a killed training left half written."""
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if PART.fullmatch(path.name):
            path.unlink(missing_ok=True)


def read_newest(folder: Path | str, *, map_location: Any = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None.

    Files are read with `weights_only=True`: nothing in them can run. A damaged one is named in a
    warning and the one before it is taken.
    """
    for _, path in reversed(list_checkpoints(folder)):
        try:
            state = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged zip raises many kinds
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"checkpoint {path} cannot be read ({reason}); trying the one before", stacklevel=2
            )
            continue
        return state
    return None
