"""Reflow: train a flow on the pairs that the flow before it makes, so that its paths straighten."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from rectiflow.distill.lora import only_adapters
from rectiflow.flows.couplings import Coupling
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.premetrics import Premetric
from rectiflow.flows.times import TimeSampler
from rectiflow.training.flow_matching import FlowMatching

MOST_ROUNDS = 3
KINDS = frozenset({"reflow", "text-reflow", "annealing", "rectified-diffusion", "phased"})
"""What the lineage calls a round of reflow: the methods of `rectiflow reflow`."""


class Reflow(FlowMatching):
    """Flow matching on a teacher's own pairs, from the teacher's weights.

    Each round keeps the marginals, lowers the transport cost of every convex cost at once and
    straightens the paths, until one step suffices. Round k's model is the "(k+1)-rectified flow";
    rounds beyond three add up solver and fitting errors and cost quality at many steps, hence a
    warning. The teacher itself is not changed.

    Args:
        teacher: the (averaged) flow that made the pairs and whose weights training starts from.
        coupling: its pairs: `StoredPairs` of `generate_pairs`, or `LivePairs`.
        times: which times are looked at; uniform by default.
        premetric: how far a prediction is from what was wanted; L2 by default.
        condition_dropout: share of samples trained on the null condition.

    Source: arXiv 2209.03003, algorithm 1 (reflow).
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: Coupling,
        *,
        times: TimeSampler | None = None,
        premetric: Premetric | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        rounds = reflow_rounds(teacher) + 1
        if rounds > MOST_ROUNDS:
            warnings.warn(
                f"this is reflow round {rounds}: beyond {MOST_ROUNDS} rounds errors add up and "
                "quality at many steps falls",
                stacklevel=2,
            )
        options: dict[str, Any] = {"condition_dropout": condition_dropout, "name": "reflow"}
        if times is not None:
            options["times"] = times
        if premetric is not None:
            options["premetric"] = premetric
        super().__init__(student_of(teacher), coupling, **options)


def student_of(teacher: FlowModel) -> FlowModel:
    """A trainable copy of a model; of one with adapters, these alone are trained."""
    return only_adapters(copy.deepcopy(teacher).requires_grad_(True)).train()


def reflow_rounds(model: FlowModel) -> int:
    """How many rounds of reflow, of any kind, a model's lineage records."""
    return sum(1 for entry in model.lineage if entry.get("method") in KINDS)
