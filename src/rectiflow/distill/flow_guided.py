"""Flow-guided distillation: one-step distillation helped by two steps of the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.distill.conditions import repeated
from rectiflow.distill.one_step import OneStepDistillation
from rectiflow.errors import positive, unknown
from rectiflow.flows.couplings import Coupling, Draw
from rectiflow.flows.fields import FlowModel, evaluating, velocity_of
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.paths import expand
from rectiflow.flows.premetrics import Premetric, Regression

if TYPE_CHECKING:
    from jaxtyping import Float

FIRST_STEPS = ("student", "teacher")


class FlowGuidedDistillation(OneStepDistillation):
    """One-step distillation on pairs, plus agreement with two steps from fresh noise.

    Use it when pairs are few or the student is small: stored pairs alone are soon learned by
    heart, while noises are free. With student v', teacher v, pairs (z, x) and fresh z and u:

    `E D(x, z + v'(z, 0)) + weight E D(z + u a + (1 - u) v(z + u a, u), z + v'(z, 0))`,

    where a, the first of the two steps, is the student's own `v'(z, 0)` or the teacher's
    `v(z, 0)`. The student's costs one evaluation less and is the better one; it is the very
    evaluation that is being trained, held constant. No gradient reaches target or teacher.

    Args:
        teacher: a straightened flow, such as the result of `AnnealingReflow`. Its weights are
            where the student starts, unless one is given.
        coupling: pairs of this teacher by an accurate solver.
        student: another model to start from, of any size.
        guided: a field around the teacher (guidance) to take the two steps in its place; its
            pairs should be the guided ones too.
        weight: of the two-step loss; 0 leaves one-step distillation.
        first_step: who takes the first of the two steps, "student" or "teacher".
        u_range: where the first step may end; (0, 1) in the paper's formula.
        premetric: D, in any form that takes a `Regression`; L2 by default.
        condition_dropout: share of samples trained on the null condition.

    Raises:
        ValueError: paths that are not straight, a student that predicts noise or the score,
            guidance with momentum, or a value out of range.

    Example:
        >>> from rectiflow.flows.couplings import LivePairs
        >>> from rectiflow.nets import build
        >>> teacher = FlowModel(build("mlp", shape=(2,), width=8, depth=1), shape=(2,))
        >>> float(FlowGuidedDistillation(teacher, LivePairs(teacher)).loss(Draw.of(4)).detach())
        0.0

    Source: arXiv 2407.12718, section 3.2 and, for the student's first step, 4.1.
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: Coupling,
        *,
        student: FlowModel | None = None,
        guided: Any = None,
        weight: float = 1.0,
        first_step: str = "student",
        u_range: tuple[float, float] = (0.2, 0.8),
        premetric: Premetric | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        positive("weight", weight, zero=True)
        if first_step not in FIRST_STEPS:
            raise unknown("first step", first_step, FIRST_STEPS)
        if not 0 <= u_range[0] <= u_range[1] <= 1:
            raise ValueError(f"u_range needs 0 <= low <= high <= 1, got {tuple(u_range)}")
        refuse_memory(guided, "the teacher's two steps end at times drawn anew")
        start = student if student is not None else teacher
        if start.path != teacher.path:
            raise ValueError(
                f"flow-guided distillation follows the teacher from the student's states, so both "
                f"need one path, got {teacher.path.name!r} for the teacher and "
                f"{start.path.name!r} for the student: reflow the teacher on that path first"
            )
        super().__init__(start, coupling, premetric=premetric, condition_dropout=condition_dropout)
        self.teacher, self.guided = teacher, guided
        self.weight, self.first_step, self.u_range = weight, first_step, u_range

    def loss(self, draw: Draw) -> Tensor:
        """The mean loss of the draw's rows."""
        pairs = self.coupling.draw(draw)
        condition = self._dropped(pairs.condition, draw)
        fresh = draw.normal(pairs.source.shape[1:]).to(pairs.source.dtype)
        low, high = self.u_range
        u = (low + (high - low) * draw.uniform()).to(fresh.dtype)
        count = fresh.shape[0]
        source = torch.cat([pairs.source, fresh])
        start = source.new_zeros(2 * count)
        # One pass for both losses.
        output = self.model(source, start, **repeated(condition, 2)).to(source.dtype)
        path, prediction = self.model.path, self.model.prediction
        step = output[count:].detach()
        if prediction != "velocity":
            step = path.convert(step, fresh, start[count:], given=prediction, wanted="velocity")
        own = step if self.first_step == "student" else None
        target = torch.cat([pairs.target, self.two_steps(fresh, u, own, **condition)])
        wanted = path.target_of(prediction, source, target, start)
        losses = self.premetric(Regression(output, wanted, source, start, target, path, prediction))
        return losses[:count].mean() + self.weight * losses[count:].mean()

    @torch.no_grad()
    def two_steps(
        self,
        source: Float[Tensor, "b *dims"],
        u: Float[Tensor, " b"],
        first: Float[Tensor, "b *dims"] | None = None,
        **condition: Any,
    ) -> Float[Tensor, "b *dims"]:
        """Where two steps lead, the first to time u along `first`, the second the teacher's.

        Args:
            source: noises.
            u: the time between the steps.
            first: the velocity of the first step; the teacher's own by default.
            **condition: of each noise.
        """
        velocity = velocity_of(self.guided if self.guided is not None else self.teacher)
        with evaluating(self.teacher, source.device):
            if first is None:
                first = velocity(source, torch.zeros_like(u), **condition).to(source.dtype)
            time = expand(u, source)
            state = source + time * first
            second = velocity(state, u, **condition).to(source.dtype)
        return state + (1 - time) * second
