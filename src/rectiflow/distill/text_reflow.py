"""Reflow of conditional flows, with guidance baked into the pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rectiflow.distill.reflow import Reflow
from rectiflow.flows.couplings import Coupling, Pairs
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.premetrics import Premetric
from rectiflow.flows.times import TimeSampler

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TextReflow(Reflow):
    """Reflow on pairs that a guided teacher made for prompts, labels or any condition.

    Guidance belongs to the pairs: follow `ClassifierFreeGuidance(teacher, 5.0)` in
    `generate_pairs(field=)` or `LivePairs(guided=)`, and train without it. The student then makes
    guided images at half the evaluations, and guiding it again moves it away from the teacher. A
    share of the samples is trained on the null condition, which keeps mild guidance (1 to 2) usable
    afterwards; without it the null condition is left as it was.

    Args:
        start: the flow training starts from, on the rectified path: the teacher, or a diffusion
            model read with `from_pipeline(init="analytic")` or `"reinterpret"`.
        coupling: the pairs; each must carry its condition.
        times: which times are looked at; uniform by default.
        premetric: how far a prediction is from what was wanted; L2 by default.
        condition_dropout: share of samples trained on the null condition.

    Raises:
        ValueError: a start that is not a rectified flow, or (when drawn) pairs without condition.

    Source: arXiv 2309.06380, section 3.2 (text-conditioned reflow); the dropout is ours.
    """

    def __init__(
        self,
        start: FlowModel,
        coupling: Coupling,
        *,
        times: TimeSampler | None = None,
        premetric: Premetric | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        if not isinstance(start.path, RectifiedPath):
            raise ValueError(
                f"text reflow needs a start on the rectified path, got {start.path.name!r}: read "
                "the pipeline with init='analytic' or 'reinterpret'"
            )
        super().__init__(
            start,
            coupling,
            times=times,
            premetric=premetric,
            condition_dropout=condition_dropout,
        )

    def losses(
        self, pairs: Pairs, t: Float[Tensor, " b"], condition: dict[str, Any]
    ) -> Float[Tensor, " b"]:
        """The loss of each pair at its time."""
        if not condition:
            raise ValueError(
                "text reflow needs pairs with a condition, got none: generate them with "
                "conditions=, or use Reflow"
            )
        return super().losses(pairs, t, condition)
