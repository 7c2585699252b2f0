"""The few-step methods by name: what each is for, what it needs, and how it is made.

The commands `rectiflow reflow` and `rectiflow distill`, their flags, the lineage of models and the
tests read this one table. A method joins by an entry; its own settings are a dataclass derived
from `Options`, whose fields become the flags `--NAME.FIELD`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rectiflow.distill.few_step_method import Choices, FewStepMethod, Options
from rectiflow.errors import positive, unknown

if TYPE_CHECKING:
    from rectiflow.flows.couplings import Coupling
    from rectiflow.flows.fields import FlowModel
    from rectiflow.training.method import Method


@dataclass(frozen=True)
class AnnealingOptions(Options):
    """Settings of annealing reflow."""

    schedule: str = "linear"
    """Fading of fresh noise: linear, cosine or exponential, with :STEPS or :SHARE%; constant:B."""


@dataclass(frozen=True)
class OneStepOptions(Options):
    """Settings of one-step distillation."""

    steps: int = 1
    """Steps the student is made for."""
    encoder: bool = False
    """Train the one-step encoder (data to noise) instead."""

    def __post_init__(self) -> None:
        positive("steps", self.steps)

    def facts(self) -> dict[str, Any]:
        if self.encoder:
            return {"method": "encoder", "student_steps": self.steps}
        return {"student_steps": self.steps}


@dataclass(frozen=True)
class FlowGuidedOptions(Options):
    """Settings of flow-guided distillation."""

    first_step: str = "student"
    """Who takes the first of the two steps: student or teacher."""
    u_range: tuple[float, float] = (0.2, 0.8)
    """Where the first step may end."""
    weight: float = 1.0
    """Weight of the two-step loss."""


@dataclass(frozen=True)
class PhasedOptions(Options):
    """Settings of rectified diffusion in phases."""

    phases: int = 4
    """Phases, each of which becomes one step."""
    teacher_steps: int = 40
    """First-order steps of the teacher over all phases; a multiple of them."""


@dataclass(frozen=True)
class ConsistencyOptions(Options):
    """Settings of consistency distillation."""

    teacher_steps: int = 50
    """First-order steps of the teacher from noise to data."""
    boundary: str = "first-order"
    """How the estimate meets the state at the data end: first-order or skip."""
    decay: float = 0.95
    """Of the moving copy that makes the targets, a step."""


@dataclass(frozen=True)
class MatchingOptions(Options):
    """Settings of distribution matching."""

    divergence: str = "js"
    """rkl, sf, js, sh, kl, jf, neyman or pearson."""
    steps: int = 1
    """Steps of the generator."""
    simulate: bool = False
    """Feed later steps with the generator's own earlier ones, not with noised data."""
    gan_weight: float = 1e-3
    """Weight of the adversarial loss."""
    student_every: int = 5
    """Steps of fake flow and discriminator for one of the generator."""
    warmup: int = 0
    """Steps before the generator's first."""


def _on_pairs(module: str, name: str) -> Callable[[FlowModel, Coupling, Choices], Method]:
    """Builds a method that regresses on pairs and has no settings of its own."""

    def build(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
        method = getattr(import_module(f"rectiflow.distill.{module}"), name)
        return method(
            choices.student if choices.student is not None else teacher,
            coupling,
            times=choices.times,
            premetric=choices.premetric,
            condition_dropout=choices.condition_dropout or 0.0,
        )

    return build


def _annealing(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
    from rectiflow.distill.annealing_reflow import AnnealingReflow
    from rectiflow.flows.annealing import parse_schedule

    assert choices.student is not None
    return AnnealingReflow(
        teacher,
        coupling,
        student=choices.student,
        schedule=parse_schedule(choices.options.schedule, choices.steps),
        times=choices.times,
        premetric=choices.premetric,
        condition_dropout=choices.condition_dropout or 0.0,
    )


def _one_step(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
    from rectiflow.distill.one_step import OneStepDistillation

    return OneStepDistillation(
        choices.student if choices.student is not None else teacher,
        coupling,
        steps=choices.options.steps,
        encoder=choices.options.encoder,
        premetric=choices.premetric,
        condition_dropout=choices.condition_dropout or 0.0,
    )


def _flow_guided(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
    from rectiflow.distill.flow_guided import FlowGuidedDistillation

    return FlowGuidedDistillation(
        teacher,
        coupling,
        student=choices.student,
        guided=choices.guided,
        weight=choices.options.weight,
        first_step=choices.options.first_step,
        u_range=choices.options.u_range,
        premetric=choices.premetric,
        condition_dropout=choices.condition_dropout or 0.0,
    )


def _phased(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
    from rectiflow.distill.rectified_diffusion import PhasedRectifiedDiffusion
    from rectiflow.flows.phased import PhasedPairs

    options = choices.options
    pairs = PhasedPairs(
        teacher,
        _data_of(coupling),
        phases=options.phases,
        steps=options.teacher_steps,
        guided=choices.guided,
    )
    return PhasedRectifiedDiffusion(
        choices.student if choices.student is not None else teacher,
        pairs,
        times=choices.times,
        premetric=choices.premetric,
        condition_dropout=choices.condition_dropout or 0.0,
    )


def _consistency(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
    from rectiflow.distill.consistency import ConsistencyDistillation

    return ConsistencyDistillation(
        teacher,
        coupling,
        steps=choices.options.teacher_steps,
        boundary=choices.options.boundary,
        decay=choices.options.decay,
        guided=choices.guided,
        premetric=choices.premetric,
    )


def _matching(teacher: FlowModel, coupling: Coupling, choices: Choices) -> Method:
    from rectiflow.distill.distribution_matching import DistributionMatching

    options = choices.options
    return DistributionMatching(
        choices.guided if choices.guided is not None else teacher,
        coupling,
        student=choices.student,
        divergence=options.divergence,
        steps=options.steps,
        simulate=options.simulate,
        times=choices.times,
        gan_weight=options.gan_weight,
        premetric=choices.premetric,
        student_every=options.student_every,
        warmup=options.warmup,
    )


def _data_of(coupling: Coupling) -> Any:
    """The data of an independent coupling."""
    data = getattr(coupling, "data", None)
    if data is None:
        raise ValueError(f"phases start from data, got {type(coupling).__name__}: give Independent")
    return data


_ENTRIES = (
    FewStepMethod(
        "reflow",
        "reflow",
        "train on the teacher's own pairs, so that its paths straighten",
        _on_pairs("reflow", "Reflow"),
        keeps_path=True,
    ),
    FewStepMethod(
        "text-reflow",
        "reflow",
        "reflow under prompts or labels, with guidance in the pairs and the null condition alive",
        _on_pairs("text_reflow", "TextReflow"),
        systems=("rectified-flow", "instaflow"),
        conditional=True,
        dropout=0.1,
    ),
    FewStepMethod(
        "annealing",
        "reflow",
        "train a small student from random weights on pairs that fade from independent to paired",
        _annealing,
        systems=("rectified-flow", "slimflow"),
        options=AnnealingOptions,
        student="needed",
    ),
    FewStepMethod(
        "rectified-diffusion",
        "reflow",
        "reflow in the teacher's own form: any path, any prediction, first-order steps",
        _on_pairs("rectified_diffusion", "RectifiedDiffusion"),
        systems=("rectified-flow", "rectified-diffusion"),
        keeps_path=True,
    ),
    FewStepMethod(
        "phased",
        "reflow",
        "rectified diffusion in phases of one step each, on data and without pairs",
        _phased,
        systems=("rectified-diffusion",),
        options=PhasedOptions,
        pairs=False,
        keeps_path=True,
        one_path=True,
    ),
    FewStepMethod(
        "one-step",
        "distill",
        "reach the ends of the pairs in one step, or in k",
        _one_step,
        options=OneStepOptions,
        lineage="distil",
        times=False,
    ),
    FewStepMethod(
        "flow-guided",
        "distill",
        "one-step distillation that also agrees with two steps of the teacher from fresh noise",
        _flow_guided,
        systems=("rectified-flow", "slimflow"),
        options=FlowGuidedOptions,
        times=False,
        one_path=True,
    ),
    FewStepMethod(
        "consistency",
        "distill",
        "name the same data from every time of the teacher's trajectories, on data",
        _consistency,
        systems=("rectified-diffusion",),
        options=ConsistencyOptions,
        pairs=False,
        times=False,
        student="impossible",
        dropout=None,
    ),
    FewStepMethod(
        "f-distill",
        "distill",
        "match the teacher's distribution under an f-divergence, on data",
        _matching,
        systems=("f-distill",),
        options=MatchingOptions,
        pairs=False,
        dropout=None,
    ),
)
METHODS: dict[str, FewStepMethod] = {entry.name: entry for entry in _ENTRIES}


def methods_of(command: str) -> dict[str, FewStepMethod]:
    """The methods of a command by name, in the order of the table.

    Example:
        >>> list(methods_of("reflow"))[:2]
        ['reflow', 'text-reflow']
    """
    return {name: entry for name, entry in METHODS.items() if entry.command == command}


def find_method(name: str, command: str) -> FewStepMethod:
    """The method of a name.

    Raises:
        ValueError: an unknown name, with the closest one; or one of the other command, named.

    Example:
        >>> find_method("one-step", "distill").lineage
        'distil'
    """
    if name in METHODS and METHODS[name].command != command:
        raise ValueError(
            f"{name} belongs to rectiflow {METHODS[name].command}: {METHODS[name].summary}"
        )
    if name not in METHODS:
        raise unknown("method", name, methods_of(command))
    return METHODS[name]
