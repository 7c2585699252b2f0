"""Small one-step students of a flow, trained with and without each idea of SlimFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rectiflow.distill.annealing_reflow import AnnealingReflow
from rectiflow.distill.flow_guided import FlowGuidedDistillation
from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.one_step import OneStepDistillation
from rectiflow.flows.annealing import Constant, Linear
from rectiflow.flows.couplings import Coupling, Independent, StoredPairs
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.sampling import sample
from rectiflow.flows.symmetry import PairSymmetry, Symmetrized
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.evaluation import Evaluator
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

PAIRED, ANNEALED = "paired from the start", "annealed"
PLAIN_PAIRS, MIRRORED = "pairs as they are", "mirrored pairs added"
FLOW, DISTILLED = "2-rectified flow", "distilled on pairs"
TEACHER_FIRST, STUDENT_FIRST = "guided, teacher's first step", "guided, student's first step"


@dataclass(frozen=True)
class Settings:
    """The three experiments."""

    data: str = "digits"
    """Images, by spec string."""
    net: str = "mlp"
    """The teacher's network or size preset."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 128, "depth": 1, "time_features": 32}
    )
    """Its arguments: 54,752 parameters."""
    student: str = "mlp:width=48,depth=1,time_features=16"
    """The student of the first two experiments: 12,000 parameters."""
    guided_student: str = "mlp:width=64,depth=1,time_features=16"
    """The student that is distilled: 17,936 parameters."""
    flow: TrainerSettings = field(default_factory=lambda: stage(2500))
    """Training of the teacher."""
    anneal: TrainerSettings = field(default_factory=lambda: stage(1500))
    """Training of a student on the teacher's pairs."""
    distil: TrainerSettings = field(default_factory=lambda: stage(600))
    """Distillation to one step."""
    ramp: float = 0.375
    """Share of the training after which no fresh noise is mixed in."""
    pairs: tuple[int, ...] = (1000,)
    """Numbers of pairs for annealing; the first is judged."""
    flow_pairs: int = 8000
    """Pairs that make the flow to distil."""
    mirrored_pairs: int = 500
    """Pairs of the experiment with mirrored pairs."""
    distil_pairs: int = 500
    """Pairs of the 2-rectified flow for its distillation."""
    solver: str = "heun"
    """Solver of the pairs."""
    solver_steps: int = 25
    """Its steps on the teacher."""
    straight_steps: int = 20
    """Its steps on the 2-rectified flow, and Euler steps of the many-step scores."""
    samples: int = 2000
    """Samples for each score."""
    features: str = "auto"
    """Features of the distance: auto, or inception:PATH for FID."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of weights, batches and pairs."""


@dataclass(frozen=True)
class Annealed:
    """A student on annealed or plain pairs.

    Attributes:
        one: Fréchet distance in one step.
        many: the same in many.
    """

    one: float
    many: float


@dataclass(frozen=True)
class OneStep:
    """A one-step generator.

    Attributes:
        distance: its Fréchet distance.
        error: mean squared difference to where the 2-rectified flow carries the same noises.
        images: some of its samples.
    """

    distance: float
    error: float
    images: Tensor


@dataclass(frozen=True)
class Found:
    """What one seed gave.

    Attributes:
        annealing: by number of pairs and arm.
        mirrored: error on pairs that were held out, by arm.
        guided: by arm.
        reference: Fréchet distance of the 2-rectified flow in many steps.
    """

    annealing: dict[int, dict[str, Annealed]]
    mirrored: dict[str, float]
    guided: dict[str, OneStep]
    reference: float


@dataclass(frozen=True)
class Lab:
    """The experiments of one seed."""

    settings: Settings
    data: ImageData
    evaluator: Evaluator
    folder: Path
    seed: int

    def teacher(self, data: ImageData) -> FlowModel:
        """A first flow on images."""
        options = self.settings.net_options
        start = new_model(self.settings.net, data.shape, seed=self.seed, **options)
        return self._train(FlowMatching(start, Independent(data)), self.settings.flow, "teacher")

    def annealing(self, teacher: FlowModel) -> tuple[dict[int, dict[str, Annealed]], FlowModel]:
        """Annealed against plain pairs; and a 2-rectified flow for the distillation."""
        found = {}
        for count in self.settings.pairs:
            pairs = self._pairs(teacher, f"pairs-{count}", count, self.settings.solver_steps)
            found[count] = {
                arm: self._annealed(self._student(teacher, pairs, annealed=arm == ANNEALED))
                for arm in (PAIRED, ANNEALED)
            }
        settings = self.settings
        pairs = self._pairs(teacher, "pairs-flow", settings.flow_pairs, settings.solver_steps)
        student = settings.guided_student
        return found, self._student(teacher, pairs, annealed=True, student=student)

    def mirrored(self) -> dict[str, float]:
        """Mirrored pairs against none, of a teacher that commutes with mirroring."""
        images = np.concatenate([self.data.images, self.data.images[..., ::-1]])
        symmetric = self.teacher(replace(self.data, images=images, captions=None))
        teacher = FlowModel(Symmetrized(symmetric.net), shape=self.data.shape)
        settings = self.settings
        pairs = self._pairs(
            teacher, "pairs-mirrored", settings.mirrored_pairs, settings.solver_steps
        )
        source, _ = self.evaluator.noises(teacher)
        wanted = sample(teacher, source=source, steps=settings.solver_steps, solver=settings.solver)
        found = {}
        couplings: dict[str, Coupling] = {PLAIN_PAIRS: pairs, MIRRORED: PairSymmetry(pairs)}
        for arm, coupling in couplings.items():
            student = self._student(teacher, coupling, annealed=True)
            found[arm] = _error(sample(student, source=source, steps=1, solver="euler"), wanted)
        return found

    def guided(self, flow: FlowModel) -> tuple[dict[str, OneStep], float]:
        """Distillation of a 2-rectified flow with and without the two-step loss."""
        settings = self.settings
        pairs = self._pairs(flow, "pairs-straight", settings.distil_pairs, settings.straight_steps)
        source, _ = self.evaluator.noises(flow)
        wanted = sample(flow, source=source, steps=settings.straight_steps, solver="heun")
        methods = {
            DISTILLED: OneStepDistillation(flow, pairs),
            TEACHER_FIRST: FlowGuidedDistillation(flow, pairs, first_step="teacher"),
            STUDENT_FIRST: FlowGuidedDistillation(flow, pairs, first_step="student"),
        }
        models = {FLOW: flow}
        for arm, method in methods.items():
            models[arm] = self._train(method, settings.distil, "distil")
        found = {}
        for arm, model in models.items():
            images = sample(model, source=source, steps=1, solver="euler")
            distance = self.evaluator.compare(images).fd
            found[arm] = OneStep(distance, _error(images, wanted), images[:16].cpu())
        return found, self.evaluator.score(flow, steps=settings.straight_steps, solver="euler").fd

    def _student(
        self, teacher: FlowModel, pairs: Coupling, *, annealed: bool, student: str | None = None
    ) -> FlowModel:
        steps = self.settings.anneal.steps
        method = AnnealingReflow(
            teacher,
            pairs,
            student=student if student is not None else self.settings.student,
            schedule=Linear(self.settings.ramp * steps) if annealed else Constant(0),
            seed=self.seed,
        )
        return self._train(method, self.settings.anneal, "student")

    def _annealed(self, model: FlowModel) -> Annealed:
        one, many = (
            self.evaluator.score(model, steps=steps, solver="euler").fd
            for steps in (1, self.settings.straight_steps)
        )
        return Annealed(one, many)

    def _train(self, method: Any, settings: TrainerSettings, title: str) -> FlowModel:
        return train(method, replace(settings, seed=self.seed), title=title)

    def _pairs(self, model: FlowModel, name: str, count: int, steps: int) -> StoredPairs:
        # Other noises than those of the scores.
        return StoredPairs(
            generate_pairs(
                model,
                self.folder / name,
                count,
                solver=self.settings.solver,
                steps=steps,
                seed=self.seed * 1000 + 1,
                gate=None,
                overwrite=True,
            )
        )


def _error(images: Tensor, wanted: Tensor) -> float:
    return float((images - wanted).square().mean())
