"""What a few-step method of the table is: its needs, its choices, and how they are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rectiflow.flows.couplings import Coupling
    from rectiflow.flows.fields import FlowModel
    from rectiflow.flows.premetrics import Premetric
    from rectiflow.flows.times import TimeSampler
    from rectiflow.training.method import Method


@dataclass(frozen=True)
class Options:
    """Settings that one method has for itself; none, here."""

    def facts(self) -> dict[str, Any]:
        """What the lineage of a model says of them."""
        return asdict(self)


@dataclass(frozen=True)
class Choices:
    """What may be chosen for every method.

    Attributes:
        steps: training steps.
        student: the model to train instead of a copy of the teacher.
        times: which times are looked at; the method's own by default.
        premetric: how far a prediction is from what was wanted; the method's own by default.
        guided: a guided field around the teacher.
        condition_dropout: share of samples trained on the null condition; the method's own by
            default.
        options: the method's own settings.
    """

    steps: int = 4000
    student: FlowModel | None = None
    times: TimeSampler | None = None
    premetric: Premetric | None = None
    guided: Any = None
    condition_dropout: float | None = None
    options: Any = field(default_factory=Options)


@dataclass(frozen=True)
class FewStepMethod:
    """A row of the table.

    Attributes:
        name: what users call it.
        command: "reflow" (the result is a straighter flow) or "distill" (a few-step generator).
        summary: one line.
        build: makes the method of a teacher, a coupling and the choices.
        systems: the systems of the catalog that it uses.
        options: the class of its own settings.
        lineage: its name in the lineage of models; the method's name by default.
        pairs: whether it trains on pairs of the teacher; on the data otherwise.
        times: whether a time sampler can be chosen.
        student: whether a student of another size is "possible", "needed" or "impossible".
        keeps_path: whether a student with random weights is put on the teacher's path; on
            straight lines otherwise.
        one_path: whether teacher and student must be on the same path.
        conditional: whether it is for teachers that take a condition only.
        dropout: share of samples trained on the null condition unless told otherwise; None for a
            method that cannot do it.
    """

    name: str
    command: str
    summary: str
    build: Callable[[FlowModel, Coupling, Choices], Method]
    systems: tuple[str, ...] = ("rectified-flow",)
    options: type[Options] = Options
    lineage: str = ""
    pairs: bool = True
    times: bool = True
    student: str = "possible"
    keeps_path: bool = False
    one_path: bool = False
    conditional: bool = False
    dropout: float | None = 0.0

    @property
    def key(self) -> str:
        """The name as an identifier."""
        return self.name.replace("-", "_")

    def entry(self, options: Options) -> dict[str, Any]:
        """What the lineage of its model says."""
        return {
            "method": self.lineage or self.name,
            **options.facts(),
            "systems": list(self.systems),
        }

    def make(self, teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
        """The method, or an error that says why these choices do not go together.

        Raises:
            ValueError: a teacher without condition where one is needed, a student that is missing
                or impossible, times where the method has its own, a condition dropout where it has
                none, or paths that differ where they must not.
        """
        if self.conditional and not teacher.conditional:
            raise ValueError(
                f"{self.name} is for teachers that take prompts or labels, and this one takes "
                "none: use reflow"
            )
        if choices.student is None and self.student == "needed":
            raise ValueError(
                f"{self.name} trains a student of its own from random weights: name one, such as "
                "unet-7m or mlp:width=48,depth=2"
            )
        if choices.student is not None and self.student == "impossible":
            raise ValueError(f"{self.name} goes on from the teacher's weights: leave out a student")
        if choices.times is not None and not self.times:
            raise ValueError(
                f"{self.name} looks only at times of its own: leave out a time sampler"
            )
        if choices.condition_dropout and self.dropout is None:
            raise ValueError(
                f"{self.name} trains on no null condition of its own: leave out a condition dropout"
            )
        start = choices.student if choices.student is not None else teacher
        if self.one_path and start.path != teacher.path:
            raise ValueError(
                f"{self.name} needs teacher and student on one path, got {teacher.path.name!r} and "
                f"{start.path.name!r}: reflow the teacher on the student's path first"
            )
        if choices.condition_dropout is None:
            choices = replace(choices, condition_dropout=self.dropout)
        return self.build(teacher, coupling, choices)
