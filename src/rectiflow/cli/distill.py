"""`rectiflow distill`: distil a straightened flow to one or few steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.reflow import StudentOptions, train_student
from rectiflow.cli.settings import parse
from rectiflow.errors import positive


@dataclass(frozen=True)
class Settings(StudentOptions):
    """Settings of `rectiflow distill`."""

    student_steps: int = 1
    """Steps the student is made for."""
    encoder: bool = False
    """Train the one-step encoder (data to noise) instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("student_steps", self.student_steps)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="distill", summary=COMMANDS["distill"].summary)
    from rectiflow.distill import OneStepDistillation
    from rectiflow.distill.reflow import reflow_rounds
    from rectiflow.flows import FlowModel

    teacher = FlowModel.from_pretrained(settings.model)
    if not reflow_rounds(teacher):
        print(
            "note: the teacher was not reflowed; a straightened teacher distils better as a rule",
            file=sys.stderr,
        )
    method = OneStepDistillation(
        teacher,
        settings.coupling(teacher),
        steps=settings.student_steps,
        encoder=settings.encoder,
        premetric=settings.loss(),
    )
    entry = {
        "method": "encoder" if settings.encoder else "distil",
        "student_steps": settings.student_steps,
    }
    train_student(settings, method, teacher, command="distill", entry=entry)
    return 0
