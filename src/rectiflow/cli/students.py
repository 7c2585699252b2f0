"""What `rectiflow reflow` and `rectiflow distill` share: their flags and the training.

Each method of the command adds the settings it has for itself, as flags `--METHOD.NAME`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import OutputOptions, data_of, guided_by, plain_warnings
from rectiflow.cli.settings import parse
from rectiflow.distill.methods import Choices, FewStepMethod, Options, find_method, methods_of
from rectiflow.errors import PairStoreError, positive
from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class StudentOptions(OutputOptions, TrainerSettings):
    """Settings of every method."""

    command: ClassVar[str] = ""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """The teacher: model folder, or owner/name on the Hub."""
    method: str = ""
    """What to do."""
    student: str | None = None
    """Train this instead of a copy of the teacher: a size (unet-7m), a network with arguments
    (mlp:width=48,depth=2), or the folder of a model to start from."""
    pairs: Path | None = None
    """Pairs made by the teacher (`rectiflow pairs`); made while training by default."""
    teacher_steps: int = 20
    """Solver steps of the teacher when pairs are made while training."""
    teacher_solver: str = "euler"
    """Its solver."""
    guidance: float | None = None
    """Scale of classifier-free guidance of the teacher (conditional teachers only)."""
    hflip: bool = False
    """Mirror half of the pairs left to right (teachers trained with flips only)."""
    premetric: str | None = None
    """Loss of a sample: l2, pseudo-huber, pseudo-huber:C, noise-l2, data-pseudo-huber:C; the
    method's own by default (l2 for most)."""
    times: str | None = None
    """Which times are looked at: uniform, uniform:LOW:HIGH, u-shaped:A, logit-normal:MEAN:STD, ...;
    the method's own by default."""
    loss_weight: str | None = None
    """Weight of the loss over time: snr, inverse-snr, snr+1, karras, truncated, clipped or
    squared-noise; uniform by default."""
    condition_dropout: float = 0.0
    """Share of samples trained without their label (conditional teachers only)."""

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        self.check_output()
        positive("teacher_steps", self.teacher_steps)
        if self.guidance is not None:
            positive("guidance", self.guidance, zero=True)
        chosen = self.chosen
        for name, other in methods_of(self.command).items():
            own = getattr(self, other.key, None)
            if own is not None and name != chosen.name and own != other.options():
                raise ValueError(
                    f"settings of {name} were given but the method is {chosen.name}: add "
                    f"--method {name} or leave out --{name}.*"
                )
        if self.loss_weight is not None and not chosen.times:
            raise ValueError(
                f"{chosen.name} looks only at times of its own, so --loss-weight has no meaning: "
                "leave it out"
            )
        if not chosen.pairs and (self.pairs is not None or self.hflip):
            raise ValueError(
                f"{chosen.name} trains on data, not on pairs: leave out --pairs/--hflip"
            )
        self.loss()
        self.sampler()

    @property
    def chosen(self) -> FewStepMethod:
        """The method of the table."""
        return find_method(self.method, self.command)

    @property
    def own(self) -> Options:
        """The settings that the method has for itself."""
        return getattr(self, self.chosen.key, Options())

    def coupling(self, teacher: Any, guided: Any) -> Any:
        """Stored pairs of this teacher, live ones, or its data."""
        from rectiflow.flows import Independent, LivePairs, PairSymmetry, StoredPairs
        from rectiflow.flows.artifact import identity

        if not self.chosen.pairs:
            data = data_of(teacher)
            plain = data if teacher.conditional else replace(data, labels=None, classes=())
            return Independent(plain)
        found: Any
        if self.pairs is not None:
            found = StoredPairs(self.pairs, expects=identity(teacher))
            _check_guidance(found.store, guided)
        else:
            labels = data_of(teacher) if teacher.conditional else None
            found = LivePairs(teacher, self.teacher_steps, self.teacher_solver, labels, guided)
        return PairSymmetry(found) if self.hflip else found

    def loss(self) -> Any:
        """The premetric, or None for the method's own."""
        from rectiflow.flows.specs import parse_premetric
        from rectiflow.flows.weights import Weighted

        if self.loss_weight is not None:
            return Weighted(parse_premetric(self.premetric or "l2"), self.loss_weight)
        return None if self.premetric is None else parse_premetric(self.premetric)

    def sampler(self) -> Any:
        """The time sampler, or None for the method's own."""
        from rectiflow.flows.specs import parse_times

        return None if self.times is None else parse_times(self.times)

    def choices(self, teacher: Any, guided: Any) -> Choices:
        """What was chosen, for the method."""
        from rectiflow.distill.students import new_student

        student = None
        if self.student is not None:
            student = new_student(
                teacher, self.student, keep_path=self.chosen.keeps_path, seed=self.seed
            )
        return Choices(
            steps=self.steps,
            student=student,
            times=self.sampler(),
            premetric=self.loss(),
            guided=guided,
            condition_dropout=self.condition_dropout,
            options=self.own,
        )


def _check_guidance(store: Any, guided: Any) -> None:
    """Refuse pairs that another guidance made."""
    from rectiflow.distill.generation import describe_field

    made = store.settings.guidance
    if guided is not None and made != describe_field(guided):
        raise PairStoreError(
            f"{store.folder} was made with {made or 'no guidance'}, not {describe_field(guided)}: "
            "generate pairs with this --guidance or leave it out here"
        )


def settings_for(command: str) -> Any:
    """The settings class of a command: what all methods share, and the own ones of each."""
    methods = methods_of(command)
    listed = "; ".join(f"{name}: {entry.summary}" for name, entry in methods.items())
    own: list[Any] = [("method", Annotated[str, tyro.conf.arg(help=listed)], next(iter(methods)))]
    own += [
        (entry.key, entry.options, field(default_factory=entry.options))
        for entry in methods.values()
        if entry.options is not Options
    ]
    return make_dataclass(
        "Settings",
        own,
        bases=(StudentOptions,),
        frozen=True,
        namespace={"command": command, "__doc__": f"Settings of `rectiflow {command}`."},
    )


def run(kind: Any, words: Sequence[str]) -> int:
    """Train a student of a teacher in a run folder and say where it is."""
    command = kind.command
    settings = parse(kind, words, command=command, summary=COMMANDS[command].summary)
    from rectiflow.distill.reflow import reflow_rounds
    from rectiflow.flows import FlowModel
    from rectiflow.training.sessions import train_model

    chosen = settings.chosen
    teacher = FlowModel.from_pretrained(settings.model)
    if command == "distill" and chosen.pairs and not reflow_rounds(teacher):
        print(
            "note: the teacher was not reflowed; a straightened teacher distils better as a rule",
            file=sys.stderr,
        )
    guided = None if settings.guidance is None else guided_by(teacher, settings.guidance)
    with plain_warnings():
        coupling = settings.coupling(teacher, guided)
        method = chosen.make(teacher, coupling, settings.choices(teacher, guided))
        check = getattr(method, "check_training", None)
        if check is not None:
            check(settings)
    named = ("premetric", "times", "loss_weight", "student", "guidance")
    asked = {name: getattr(settings, name) for name in named}
    entry = {
        **chosen.entry(settings.own),
        **{name: value for name, value in asked.items() if value is not None},
        **({"hflip": True} if settings.hflip else {}),
    }
    with settings.open(command, str(teacher.data.get("name", ""))) as opened:
        for system in chosen.systems:
            opened.used(system)
        train_model(
            method,
            settings,
            opened.folder,
            entry=entry,
            parent=teacher,
            title=chosen.name,
            resume=settings.resume,
        )
        if opened.main:
            print(f"model: {opened.path('model')}")
    return 0
