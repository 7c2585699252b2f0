"""Annealing reflow: a small student from random weights, straight from a big teacher's pairs."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn

from rectiflow.distill.students import new_student
from rectiflow.flows.annealing import AnnealedPairs, Linear, Schedule
from rectiflow.flows.couplings import Coupling
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.premetrics import Premetric
from rectiflow.flows.times import TimeSampler
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings


class AnnealingReflow(FlowMatching):
    """Flow matching of a new, small network on annealed pairs of a teacher.

    Use it to lose parameters and steps at once: reflow needs a start that is already a flow, and
    a small one would have to be trained first. Here the student begins as a first flow on the
    teacher's samples (b = 1) and ends as a reflowed one (b = 0). Any teacher will do, on any path:
    only its pairs are used. Stopped before b reaches 0, the student is not a reflowed flow, so
    a training shorter than the ramp is refused.

    Args:
        teacher: made the pairs; says shape, classes and data of the student.
        coupling: its pairs: `StoredPairs` of `generate_pairs`, or `LivePairs`.
        student: a network, or its name and arguments (`unet-7m`, `mlp:width=48,depth=2`); a
            `FlowModel` is taken as it is.
        schedule: the share of fresh noise over training steps.
        times: which times are looked at; uniform by default.
        premetric: how far a prediction is from what was wanted; L2 by default.
        condition_dropout: share of samples trained on the null condition.
        seed: decides the student's random weights.

    Example:
        >>> from rectiflow.flows.couplings import LivePairs
        >>> from rectiflow.nets import build
        >>> teacher = FlowModel(build("mlp", shape=(2,), width=32, depth=2), shape=(2,))
        >>> method = AnnealingReflow(teacher, LivePairs(teacher), student="mlp:width=8,depth=1")
        >>> method.model.net.config["width"]
        8

    Source: arXiv 2407.12718, section 3.1. Learning rate, loss and average are the trainer's.
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: Coupling,
        *,
        student: str | nn.Module,
        schedule: Schedule | None = None,
        times: TimeSampler | None = None,
        premetric: Premetric | None = None,
        condition_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = {"condition_dropout": condition_dropout, "name": "annealing"}
        if times is not None:
            options["times"] = times
        if premetric is not None:
            options["premetric"] = premetric
        if not isinstance(student, FlowModel):
            student = new_student(teacher, student, seed=seed)
        self.schedule = schedule if schedule is not None else Linear()
        if math.isinf(self.schedule.ramp):
            warnings.warn(
                f"{self.schedule} keeps some fresh noise to the end, so the student will not be "
                "quite a reflowed flow: use it to compare, not to keep",
                stacklevel=2,
            )
        super().__init__(student, AnnealedPairs(coupling, self.schedule), **options)

    def check_training(self, settings: TrainerSettings) -> None:
        """Refuse a training that ends while fresh noise is still mixed in.

        Raises:
            ValueError: fewer steps than the ramp.
        """
        ramp = self.schedule.ramp
        if not math.isinf(ramp) and settings.steps < ramp:
            raise ValueError(
                f"annealing ends after {ramp:g} steps and the training after {settings.steps}: a "
                "student stopped before is no reflowed flow, so train longer or shorten the ramp"
            )
