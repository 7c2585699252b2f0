"""One-step and few-step distillation of a straightened flow."""

from __future__ import annotations

from typing import Any

from rectiflow.distill.rectified_diffusion import check_start
from rectiflow.distill.reflow import student_of
from rectiflow.errors import positive
from rectiflow.flows.couplings import Coupling
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.premetrics import Premetric
from rectiflow.flows.times import Discrete
from rectiflow.training.flow_matching import FlowMatching


class OneStepDistillation(FlowMatching):
    """Teach a flow to reach the ends of its pairs in one Euler step, or in k equal ones.

    The loss is that of flow matching, looked at only where those steps start: `t = 0` for one step
    (`z + v(z, 0)` against the pair's target), `t in {0, 1/k, ..., (k-1)/k}` for k. Distil last,
    after reflow: it keeps the coupling and gives up the field in between. `encoder=True` trains
    the opposite step instead, from data to noise at `t = 1`.

    Args:
        teacher: the flow whose weights training starts from.
        coupling: its pairs.
        steps: k, the number of Euler steps the student is made for.
        encoder: train the one-step encoder (k = 1 only).
        premetric: how far a prediction is from what was wanted; L2 by default.
        condition_dropout: share of samples trained on the null condition.

    Raises:
        ValueError: `steps` below 1, an encoder of several steps, a path that is not straight, or a
            prediction that leaves the other end open where the steps start (noise or score; data
            for an encoder).

    Source: arXiv 2209.03003, section 2.2 (distillation).
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: Coupling,
        *,
        steps: int = 1,
        encoder: bool = False,
        premetric: Premetric | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        positive("steps", steps)
        if encoder and steps != 1:
            raise ValueError(f"a one-step encoder has one step, got steps={steps}")
        if not isinstance(teacher.path, RectifiedPath):
            raise ValueError(
                f"one-step distillation needs a model on the rectified path, got "
                f"{teacher.path.name!r}: reflow it on that path first"
            )
        if not encoder:
            check_start(teacher)
        elif teacher.prediction == "data":
            raise ValueError(
                "a data prediction says nothing of the noise at t = 1, where the encoder starts: "
                "use a model that predicts velocity, noise or v"
            )
        options: dict[str, Any] = {"condition_dropout": condition_dropout, "name": "distil"}
        if premetric is not None:
            options["premetric"] = premetric
        times = Discrete((1.0,)) if encoder else Discrete.grid(steps)
        student = student_of(teacher)
        student.sampling = {"solver": "euler", "steps": steps, "made_for": steps}
        if encoder:
            student.sampling["steps"] = [1.0, 0.0]
        super().__init__(student, coupling, times=times, **options)
