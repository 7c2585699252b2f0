"""Diagnoses in a training: when they look, where their records and plots go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rectiflow.training.records import MetricsLog, read_log
from rectiflow.training.report import Section, write_report
from rectiflow.training.trainer import Trainer

FOLDER = "diagnose"
"""Where records and pictures go in the folder of a run."""


@runtime_checkable
class Diagnosis(Protocol):
    """Something that looks at a model now and then, and changes nothing.

    `observe` is called after every training step; it decides itself whether to look. What it
    returns is a dataclass with a `step`.
    """

    @property
    def name(self) -> str:
        """What its files are called."""

    def observe(self, step: int, optimizer: Any = None) -> Any:
        """A record of the step, which the optimizer has just taken, or None."""

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plots of all records as tables; file to caption."""


class Watch:
    """A callback for the trainer: diagnoses look on, their records and plots go into a folder.

    Each diagnosis leaves `diagnose/NAME.jsonl`, one record a line, as training goes; at its last
    step plots follow, and `report.html` with all of them. When training resumes from an earlier
    step, the records are cut back to it and go on. Several processes hold the same weights, so only
    the first one looks. Weights, optimizer and random numbers stay as they are: the training is the
    same bit for bit.

    Args:
        diagnoses: what looks on.
        folder: the run's folder; without one, records are kept in `rows` and nothing is drawn.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> from rectiflow.flows.couplings import Independent
        >>> from rectiflow.diagnose import FlowProbe, Sharpness
        >>> from rectiflow.nets import build
        >>> from rectiflow.training import FlowMatching, TrainerSettings
        >>> import torch
        >>> model = FlowModel(build("mlp", shape=(2,), width=8, depth=1), shape=(2,))
        >>> method = FlowMatching(model, Independent(torch.randn(64, 2)))
        >>> watch = Watch([Sharpness(FlowProbe(method, 16), every=2)])
        >>> trained = Trainer(
        ...     method, TrainerSettings(steps=4, batch_size=8), callbacks=[watch]).fit()
        >>> [row["step"] for row in watch.rows["sharpness"]]
        [2, 4]
    """

    def __init__(self, diagnoses: Sequence[Diagnosis], folder: Path | None = None) -> None:
        self.diagnoses, self.folder = list(diagnoses), folder
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self._logs: dict[str, MetricsLog] = {}

    def __call__(self, trainer: Trainer, step: int) -> None:
        if not trainer.accelerator.is_main_process:
            return
        self.observe(step, trainer.optimizers[0])
        if trainer.ends and self.folder is not None:
            drawn = {
                d.name: d.draw(self.rows[d.name], self.folder / FOLDER) for d in self.diagnoses
            }
            empty = "Nothing to draw: its records say what it saw."
            sections = [
                Section(name, pictures=pictures, texts=[] if pictures else [empty])
                for name, pictures in drawn.items()
            ]
            write_report(self.folder / "report.html", trainer.title, sections)

    def observe(self, step: int, optimizer: Any = None) -> None:
        """Let every diagnosis look after a step; for training loops of your own."""
        if not self.rows:
            self._begin(step - 1)
        for diagnosis in self.diagnoses:
            found = diagnosis.observe(step, optimizer)
            if found is not None:
                row = as_row(found)
                self.rows[diagnosis.name].append(row)
                self._logs[diagnosis.name].write(step, row)

    def _begin(self, step: int) -> None:
        """Open the files, keeping records of steps that are over."""
        for diagnosis in self.diagnoses:
            path = None if self.folder is None else self.folder / FOLDER / f"{diagnosis.name}.jsonl"
            self._logs[diagnosis.name] = MetricsLog(path, step)
            self.rows[diagnosis.name] = [] if path is None else list(read_log(path))


def as_row(record: Any) -> dict[str, Any]:
    """A record as a table of plain values; None for numbers that are not finite.

    Example:
        >>> as_row({"a": (1, float("nan")), "b": {2: 3.0}})
        {'a': [1, None], 'b': {'2': 3.0}}
    """
    if is_dataclass(record):
        named = {field.name: getattr(record, field.name) for field in fields(record)}
        return {name: _plain(value) for name, value in named.items()}
    return {str(name): _plain(value) for name, value in record.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) or isinstance(value, Mapping):
        return as_row(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
