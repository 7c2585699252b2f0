"""`rectiflow reflow`: straighten a flow on its own pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import OutputOptions, data_of, plain_warnings
from rectiflow.cli.settings import parse
from rectiflow.errors import positive, unknown
from rectiflow.training.trainer import TrainerSettings

PREMETRICS = ("l2", "pseudo-huber")


@dataclass(frozen=True)
class StudentOptions(OutputOptions, TrainerSettings):
    """What reflow and distillation share."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """The teacher: model folder, or owner/name on the Hub."""
    pairs: Path | None = None
    """Pairs made by the teacher (`rectiflow pairs`); made while training by default."""
    teacher_steps: int = 20
    """Solver steps of the teacher when pairs are made while training."""
    teacher_solver: str = "euler"
    """Its solver."""
    premetric: str = "l2"
    """l2 or pseudo-huber."""

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        self.check_output()
        positive("teacher_steps", self.teacher_steps)
        if self.premetric not in PREMETRICS:
            raise unknown("premetric", self.premetric, PREMETRICS)

    def coupling(self, teacher: Any) -> Any:
        """Stored pairs of this teacher, or live ones."""
        from rectiflow.flows import LivePairs, StoredPairs
        from rectiflow.flows.artifact import identity

        if self.pairs is not None:
            return StoredPairs(self.pairs, expects=identity(teacher))
        labels = data_of(teacher) if teacher.conditional else None
        return LivePairs(teacher, self.teacher_steps, self.teacher_solver, labels)

    def loss(self) -> Any:
        """The premetric."""
        from rectiflow.flows.premetrics import L2, PseudoHuber

        return L2() if self.premetric == "l2" else PseudoHuber()


@dataclass(frozen=True)
class Settings(StudentOptions):
    """Settings of `rectiflow reflow`."""


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="reflow", summary=COMMANDS["reflow"].summary)
    from rectiflow.distill import Reflow
    from rectiflow.flows import FlowModel

    teacher = FlowModel.from_pretrained(settings.model)
    with plain_warnings():
        method = Reflow(teacher, settings.coupling(teacher), premetric=settings.loss())
    train_student(settings, method, teacher, command="reflow", entry={"method": "reflow"})
    return 0


def train_student(
    settings: StudentOptions, method: Any, teacher: Any, *, command: str, entry: dict[str, Any]
) -> None:
    """Train a student of a teacher in a run folder and say where it is."""
    from rectiflow.training.sessions import train_model

    with settings.open(command, str(teacher.data.get("name", ""))) as run:
        run.used("rectified-flow")
        train_model(
            method,
            settings,
            run.folder,
            entry={**entry, "premetric": settings.premetric, "systems": ["rectified-flow"]},
            parent=teacher,
            title=command,
            resume=settings.resume,
        )
        if run.main:
            print(f"model: {run.path('model')}")
