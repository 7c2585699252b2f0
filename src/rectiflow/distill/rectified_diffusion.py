"""Rectified diffusion: reflow for any diffusion model, in its own form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rectiflow.distill.reflow import student_of
from rectiflow.flows.couplings import Coupling, Pairs
from rectiflow.flows.data_premetrics import DataPseudoHuber
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.first_order import first_order_jump
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.phased import PhasedDraw, PhasedPairs
from rectiflow.flows.premetrics import Premetric, Regression
from rectiflow.flows.tables import DiscretePath
from rectiflow.flows.times import TimeSampler
from rectiflow.training.flow_matching import FlowMatching


class RectifiedDiffusion(FlowMatching):
    """Train a diffusion model again on its own pairs; path, prediction and weights stay.

    What makes few steps exact is not a straight path but a noise estimate that is constant along
    trajectories (`first_order_gap` 0), and training on deterministic pairs gives that on every
    path. So no model need first be converted to straight lines. Sample the result with the
    "first-order" solver, in as few steps as quality allows. With the rectified path, velocity
    prediction and `L2` it is `Reflow`, bit for bit.

    Args:
        teacher: the (averaged) model that made the pairs and whose weights training starts from.
        coupling: its pairs: `StoredPairs` of `generate_pairs`, or `LivePairs`; guidance is baked
            in by the field that made them.
        times: which times are looked at; uniform by default (the indices of a discrete path).
        premetric: how far a prediction is from what was wanted: `DataPseudoHuber` (default),
            `NoiseL2`, `L2` in the network's own prediction, or any other.
        condition_dropout: share of samples trained on the null condition, so that a little
            guidance can still be added.

    Raises:
        ValueError: a noise or score prediction on a path that starts from pure noise, or a
            dropout outside [0, 1].

    Source: arXiv 2410.07303, algorithm 1, with the loss of its official code.
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: Coupling,
        *,
        times: TimeSampler | None = None,
        premetric: Premetric | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        check_start(teacher)
        student = student_of(teacher)
        if not isinstance(teacher.path, RectifiedPath):
            student.sampling["solver"] = "first-order"
        _set_up(self, student, coupling, times, premetric, condition_dropout, "rectify")


class PhasedRectifiedDiffusion(FlowMatching):
    """Rectify a model in phases: one first-order step carries it through each.

    Easier than one phase, and no pairs have to be stored: the teacher follows real, noised samples
    through their phase while training. The student sees a state x_t on the exact line of its
    phase, jumps to the phase's end, and is compared with where the teacher arrived.

    Args:
        teacher: the model whose weights training starts from.
        coupling: `PhasedPairs` of the same path; its boundaries become the student's grid.
        times: which part of a phase is looked at, as a time in [0, 1]; uniform by default.
        premetric: how far the reached states are apart; element-wise pseudo-Huber by default.
        condition_dropout: share of samples trained on the null condition.

    Raises:
        ValueError: a coupling that is not phased or of another path, or a noise or score
            prediction on a path that starts from pure noise.

    Source: arXiv 2410.07303, section 3.4 and official code.
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: PhasedPairs,
        *,
        times: TimeSampler | None = None,
        premetric: Premetric | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        if not isinstance(coupling, PhasedPairs):
            raise ValueError(
                f"training in phases needs PhasedPairs, got {type(coupling).__name__}: other "
                "pairs go with RectifiedDiffusion"
            )
        if coupling.teacher.path != teacher.path:
            raise ValueError(
                f"the phases lie on the path {coupling.teacher.path.name!r}, the model on "
                f"{teacher.path.name!r}: both must be the same"
            )
        check_start(teacher)
        student = student_of(teacher)
        grid = coupling.boundaries
        even = all(abs(t - i / coupling.phases) < 1e-9 for i, t in enumerate(grid))
        student.sampling = {"solver": "first-order", "steps": coupling.phases if even else grid}
        _set_up(self, student, coupling, times, premetric, condition_dropout, "phases")

    def losses(self, pairs: Pairs, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """The loss of each pair at its part of the phase, shape `(b,)`."""
        assert isinstance(pairs, PhasedDraw)
        model, path = self.model, self.model.path
        t = (pairs.begin + t * (pairs.end - pairs.begin)).to(t.dtype)
        x = path.interpolate(pairs.source, pairs.target, t)
        output = model(x, t, **condition).to(x.dtype)
        reached = first_order_jump(path, output, x, t, pairs.end, given=model.prediction)
        wanted = path.interpolate(pairs.source, pairs.target, pairs.end.to(t.dtype))
        # The end of a phase is to the phase what data are to the whole way.
        return self.premetric(Regression(reached, wanted, x, t, wanted, path, "data"))


def _set_up(
    method: FlowMatching,
    student: FlowModel,
    coupling: Coupling,
    times: TimeSampler | None,
    premetric: Premetric | None,
    condition_dropout: float,
    name: str,
) -> None:
    """Initialise a method with what was given, and with the defaults of rectified diffusion."""
    options: dict[str, Any] = {"condition_dropout": condition_dropout, "name": name}
    if times is not None:
        options["times"] = times
    elif isinstance(student.path, DiscretePath) and not isinstance(coupling, PhasedPairs):
        options["times"] = student.path.training_times()
    options["premetric"] = premetric if premetric is not None else DataPseudoHuber()
    FlowMatching.__init__(method, student, coupling, **options)


def check_start(model: FlowModel) -> None:
    """Raise ValueError if the model's prediction leaves the data open where sampling starts."""
    start = float(model.path.alpha(torch.zeros((), dtype=torch.float64)))
    if model.prediction in ("noise", "score") and start == 0:
        raise ValueError(
            f"a {model.prediction} prediction says nothing of the data at t = 0 of the path "
            f"{model.path.name!r}, where few-step sampling starts (alpha is 0): use a model that "
            "predicts velocity, data or v"
        )
