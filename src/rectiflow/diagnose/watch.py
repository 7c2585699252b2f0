"""Diagnoses in a training: when they look, where their records and plots go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rectiflow.training.optimizers import rate
from rectiflow.training.records import MetricsLog, read_log
from rectiflow.training.trainer import Trainer


@runtime_checkable
class Diagnosis(Protocol):
    """Something that looks at a model now and then, and changes nothing.

    `observe` is called after every training step; it decides itself whether to look. What it
    returns is a dataclass with a `step`.
    """

    @property
    def name(self) -> str:
        """What its files are called."""

    def observe(self, step: int, *, learning_rate: float | None = None) -> Any:
        """A record of the step, or None."""

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plots of all records as tables; file to caption."""


class Watch:
    """A callback for the trainer: diagnoses look on, their records and plots go into a folder.

    Each diagnosis leaves `NAME.jsonl`, one record a line, as training goes, and plots at the end.
    The file is cut back when training resumes from an earlier step. Several processes hold the same
    weights, so only the first one looks.

    Args:
        diagnoses: what looks on.
        folder: where files go, such as `diagnose` in the run's folder; without one, records are
            kept in `rows` and nothing is drawn.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> from rectiflow.flows.couplings import Independent
        >>> from rectiflow.diagnose import FlowProbe, Sharpness
        >>> from rectiflow.nets import build
        >>> from rectiflow.training import FlowMatching, TrainerSettings
        >>> import torch
        >>> model = FlowModel(build("mlp", shape=(2,), width=8, depth=1), shape=(2,))
        >>> method = FlowMatching(model, Independent(torch.randn(64, 2)))
        >>> watch = Watch([Sharpness(FlowProbe.of(method, 16), every=2)])
        >>> trained = Trainer(
        ...     method, TrainerSettings(steps=4, batch_size=8), callbacks=[watch]).fit()
        >>> [row["step"] for row in watch.rows["sharpness"]]
        [2, 4]
    """

    def __init__(self, diagnoses: Sequence[Diagnosis], folder: Path | None = None) -> None:
        self.diagnoses, self.folder = list(diagnoses), folder
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.pictures: dict[Path, str] = {}
        self._logs: dict[str, MetricsLog] = {}

    def __call__(self, trainer: Trainer, step: int) -> None:
        if not trainer.accelerator.is_main_process:
            return
        phase = trainer.phases[0]
        options = phase.optimizer or trainer.settings.optim
        # The step was taken with the rate of the number before it.
        since, length = step - 1 - phase.first, trainer.settings.steps - phase.first
        self.observe(step, learning_rate=rate(options, max(since, 0), length))
        if step == trainer.settings.steps:
            self.draw()

    def observe(self, step: int, *, learning_rate: float | None = None) -> None:
        """Let every diagnosis look after a step; for training loops of your own."""
        if not self.rows:
            self._begin(step - 1)
        for diagnosis in self.diagnoses:
            found = diagnosis.observe(step, learning_rate=learning_rate)
            if found is not None:
                row = as_row(found)
                self.rows[diagnosis.name].append(row)
                self._logs[diagnosis.name].write(step, row)

    def draw(self) -> dict[Path, str]:
        """Draw the plots of all records so far; for trainings that end early, too."""
        if self.folder is not None:
            for diagnosis in self.diagnoses:
                self.pictures |= diagnosis.draw(self.rows.get(diagnosis.name, []), self.folder)
        return self.pictures

    def _begin(self, step: int) -> None:
        """Open the files, keeping records of steps that are over."""
        for diagnosis in self.diagnoses:
            path = None if self.folder is None else self.folder / f"{diagnosis.name}.jsonl"
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
