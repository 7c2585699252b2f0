"""Models of a comparison beside the ones they were reflowed from: would another round help?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rectiflow.distill.reflow import KINDS
from rectiflow.distill.straightening import Straightening, careful_solver, profile
from rectiflow.flows.artifact import identity
from rectiflow.flows.couplings import Pairs
from rectiflow.flows.sampling import sample
from rectiflow.training.comparison import FOLLOWED, Compared
from rectiflow.training.report import Section, Table

if TYPE_CHECKING:
    from rectiflow.training.evaluation import Evaluator

COUNT = 512
"""Pairs of the earlier model that both are measured on."""


@dataclass(frozen=True)
class Round:
    """A round of reflow between two models.

    Attributes:
        before: title of the earlier model.
        after: title of the later one.
        found: what the round straightened.
    """

    before: str
    after: str
    found: Straightening

    @property
    def text(self) -> str:
        """The finding with the names of both."""
        return f"From {self.before} to {self.after}: {self.found.sentence}"

    def facts(self) -> dict[str, Any]:
        """The round as plain values."""
        names = {"before": self.before, "after": self.after}
        return {**names, "another_round": self.found.another_round, "found": asdict(self.found)}


def reflowed(entries: Sequence[Compared]) -> list[tuple[Compared, Compared]]:
    """Pairs of models of which the second was reflowed from the first, by its lineage."""
    known = {(identity(entry.model) or "")[:12]: entry for entry in entries}
    found = []
    for entry in entries:
        last = entry.model.lineage[-1] if entry.model.lineage else {}
        before = known.get(last.get("parent", ""))
        if before is not None and last.get("method") in KINDS:
            found.append((before, entry))
    return found


def measure_rounds(entries: Sequence[Compared], evaluator: Evaluator) -> list[Round]:
    """Measure every round among the models on fresh pairs of the earlier one."""
    rounds = []
    for before, after in reflowed(entries):
        source, condition = evaluator.noises(before.model)
        source = source[:COUNT]
        condition = {name: rows[:COUNT] for name, rows in condition.items()}
        solver = careful_solver(before.model)
        target = sample(before.model, source=source, steps=FOLLOWED, solver=solver, **condition)
        pairs = Pairs(source, target, condition)
        both = [profile(one.model, pairs, steps=FOLLOWED, count=COUNT) for one in (before, after)]
        rounds.append(Round(before.title, after.title, Straightening(*both)))
    return rounds


def rounds_section(rounds: Sequence[Round]) -> list[Section]:
    """The part of a page about rounds; nothing without any."""
    if not rounds:
        return []
    header = ["time", "loss before", "loss after", "gap before", "gap after"]
    tables = [
        Table(header, one.found.rows(), caption=f"{one.before} to {one.after}, a dimension")
        for one in rounds
    ]
    return [Section("Would another round help?", [one.text for one in rounds], tables)]
