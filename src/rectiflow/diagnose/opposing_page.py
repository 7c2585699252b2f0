"""Plots of opposing signals, and the samples found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rectiflow.training.figures import compare_samples, curves
from rectiflow.training.report import cell

if TYPE_CHECKING:
    from rectiflow.diagnose.probes import Probe

SHOWN = 25
"""Most samples of a group on a sheet."""


class Watched(Protocol):
    """What a page needs to know beyond its rows."""

    probe: Probe
    steps: list[int]

    def history(self, group: Sequence[int]) -> list[float]:
        """The mean loss of some samples after each step in `steps`."""


def draw(rows: Sequence[Mapping[str, Any]], watched: Watched, folder: Path) -> dict[Path, str]:
    """Three plots and a sheet; file to caption.

    The groups shown are those of the step after which the loss rose most.

    Args:
        rows: reports as tables.
        watched: the probe and its losses over the run.
        folder: where the pictures go.
    """
    if not rows:
        return {}
    spike = max(rows, key=lambda row: row["change"])
    pictures = _losses(spike, watched, folder / "opposing-losses.png")
    pictures |= _sharpness(rows, folder / "opposing-sharpness.png")
    pictures |= _cosines(rows, folder / "opposing-cosines.png")
    return pictures | _sheet(spike, watched, folder / "opposing-samples.png")


def _losses(spike: Mapping[str, Any], watched: Watched, path: Path) -> dict[Path, str]:
    if not watched.steps:
        return {}
    everyone = range(len(watched.probe))
    groups = {"all": everyone, "G+": spike["idx_plus"], "G-": spike["idx_minus"]}
    drawn = curves(
        {name: (watched.steps, watched.history(group)) for name, group in groups.items()},
        path,
        across="training step",
        up="mean loss",
        logarithmic="y",
    )
    return {
        drawn: f"Mean losses from step {watched.steps[0]} on of all samples and of the groups of "
        f"step {spike['step']}, after which the loss had risen most (by {cell(spike['change'])}): "
        f"G+ rose by {cell(spike['change_plus'])}, G- by {cell(spike['change_minus'])}."
    }


def _sharpness(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[Path, str]:
    known = [row for row in rows if row["eta_lambda"] is not None]
    if not known:
        return {}
    values = [row["eta_lambda"] for row in known]
    drawn = curves(
        {"rate x sharpness": ([row["step"] for row in known], values)},
        path,
        across="training step",
        up="learning rate x sharpness",
        floor=("edge of stability of plain descent", 2.0),
    )
    above = sum(value > 2 for value in values)
    return {
        drawn: f"Learning rate times sharpness: from {cell(min(values))} to {cell(max(values))}, "
        f"above 2 at {above} of {len(values)} reported steps."
    }


def _cosines(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[Path, str]:
    names = {
        "G+ and G-": "cos_pm",
        "random groups, one mix of labels": "cos_rand",
        "random groups, labels of G+ and G-": "cos_labels",
        "other samples, same losses": "cos_matched",
    }
    lines = {}
    for name, key in names.items():
        known = [row for row in rows if row[key] is not None]
        if known:
            lines[name] = ([row["step"] for row in known], [row[key] for row in known])
    drawn = curves(lines, path, across="training step", up="cosine of the groups' gradients")
    middle = sorted(row["cos_pm"] for row in rows)[len(rows) // 2]
    usual, alike = (
        sorted(row[key] for row in rows)[len(rows) // 2] for key in ("cos_rand", "cos_labels")
    )
    return {
        drawn: f"Cosine of the gradients of the two groups: {cell(middle)} in the middle, "
        f"{cell(usual)} for random groups of one mix of labels, {cell(alike)} for random groups "
        "with the labels of G+ and of G-."
    }


def _sheet(spike: Mapping[str, Any], watched: Watched, path: Path) -> dict[Path, str]:
    sides = {"G+: losses rose most": spike["idx_plus"], "G-: losses fell most": spike["idx_minus"]}
    panels = {
        name: watched.probe.pictures(torch.tensor(list(group)[:SHOWN]))
        for name, group in sides.items()
    }
    found = {name: images.float().cpu() for name, images in panels.items() if images is not None}
    if not found:
        return {}
    drawn = compare_samples(found, path)
    return {drawn: f"The samples moved most by step {spike['step']}, the most moved first."}
