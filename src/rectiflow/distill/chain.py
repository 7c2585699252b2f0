"""The main job in one call: data in, a one-step generator out.

Train a flow, let it make pairs, reflow on them, distil to one step, and score every model on the
way. Each stage leaves a folder; a stage that is complete is not done again on resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.one_step import OneStepDistillation
from rectiflow.distill.reflow import Reflow
from rectiflow.errors import positive
from rectiflow.flows.couplings import Independent, StoredPairs
from rectiflow.flows.fields import FlowModel
from rectiflow.nets import build
from rectiflow.training.data import ImageData
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.progress import Stopwatch, bar
from rectiflow.training.sessions import forget, train_model
from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher makes pairs in the chain."""

    count: int = 20_000
    """Pairs."""
    solver: str = "euler"
    """Solver of the teacher."""
    steps: int = 50
    """Its steps on a first flow."""
    straight_steps: int = 20
    """Its steps on a reflowed flow, which needs fewer."""
    batch_size: int = 1000
    """Pairs computed together."""

    def __post_init__(self) -> None:
        for name in ("count", "steps", "straight_steps", "batch_size"):
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class ChainSettings:
    """The stages and their sizes."""

    net: str = "mlp"
    """Network or size preset."""
    flow: TrainerSettings = field(default_factory=TrainerSettings)
    """The first flow, on independent pairs."""
    pairs: TeacherSettings = field(default_factory=TeacherSettings)
    """Pairs for reflow and distillation."""
    reflow: TrainerSettings = field(default_factory=TrainerSettings)
    """Each round of reflow."""
    distil: TrainerSettings = field(default_factory=TrainerSettings)
    """Distillation to one step."""
    rounds: int = 1
    """Rounds of reflow."""
    seed: int = 0
    """Seed of weights, data order and noises."""


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        key: flow, reflow-1, ..., one-step.
        title: what people call its model.
        model: the model.
        folder: its folder.
        seconds: wall time of training and pair generation, 0 when it was there already.
    """

    key: str
    title: str
    model: FlowModel
    folder: Path
    seconds: float


def make_one_step(
    data: ImageData,
    settings: ChainSettings,
    folder: Path | str,
    *,
    spec: str | None = None,
    net: Callable[[], torch.nn.Module] | None = None,
    resume: bool = False,
) -> list[Stage]:
    """Train, generate pairs, reflow, distil; returns every stage in order.

    Args:
        data: the training images.
        settings: the stages.
        folder: receives `flow/`, `reflow-1/`, ..., `one-step/` (each with `model/`), and the pairs.
        spec: the spec string of the data, recorded so that the models can be evaluated later.
        net: makes the network; the preset of the settings by default.
        resume: keep complete stages and go on inside the unfinished one; without it the stages of
            an earlier chain are removed.

    Source: arXiv 2209.03003, algorithm 1, with distillation (section 2.2) as the last stage.
    """
    folder = Path(folder)
    facts = {"data": data.name, "samples": len(data)}
    flow, reflow, distil = (
        replace(s, seed=settings.seed) for s in (settings.flow, settings.reflow, settings.distil)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        made = net() if net is not None else build(settings.net, shape=data.shape)
    about: dict[str, Any] = {"name": data.name, "classes": list(data.classes)}
    if spec is not None:
        about.update(spec=spec, size=data.shape[-1], channels=data.shape[0])
    if not resume:
        for stage in ("flow", *(f"reflow-{n + 1}" for n in range(settings.rounds)), "one-step"):
            forget(folder / stage)
    start = FlowModel(made, shape=data.shape, data=about)
    unlabelled = replace(data, labels=None, classes=())
    source = data if start.conditional else unlabelled
    with Stopwatch() as watch:
        model = train_model(
            FlowMatching(start, Independent(source)),
            flow,
            folder / "flow",
            entry={"method": "flow", **facts, "systems": ["rectified-flow"]},
            title="train",
            resume=resume,
        )
    stages = [Stage("flow", "1-rectified flow", model, folder / "flow", watch.seconds)]
    store = None
    for number in range(1, settings.rounds + 1):
        key = f"reflow-{number}"
        with Stopwatch() as watch:
            store = _pairs(model, folder / f"pairs-{number}", source, settings, number)
            model = train_model(
                Reflow(model, StoredPairs(store)),
                reflow,
                folder / key,
                entry={"method": "reflow", "pairs": settings.pairs.count},
                parent=model,
                title=f"reflow {number}",
                resume=resume,
            )
        title = f"{number + 1}-rectified flow"
        stages.append(Stage(key, title, model, folder / key, watch.seconds))
    with Stopwatch() as watch:
        number = settings.rounds + 1
        store = _pairs(model, folder / f"pairs-{number}", source, settings, number)
        student = train_model(
            OneStepDistillation(model, StoredPairs(store)),
            distil,
            folder / "one-step",
            entry={"method": "distil", "pairs": settings.pairs.count, "student_steps": 1},
            parent=model,
            title="distil",
            resume=resume,
        )
    stages.append(Stage("one-step", "one-step model", student, folder / "one-step", watch.seconds))
    return stages


def _pairs(
    model: FlowModel, folder: Path, data: ImageData, settings: ChainSettings, number: int
) -> Any:
    with bar(f"pairs {number}", settings.pairs.count, unit="pairs") as progress:
        return generate_pairs(
            model,
            folder,
            settings.pairs.count,
            solver=settings.pairs.solver,
            steps=settings.pairs.steps if number == 1 else settings.pairs.straight_steps,
            batch_size=settings.pairs.batch_size,
            # Other noises than the evaluation's and than the other rounds'.
            seed=settings.seed * 1000 + number,
            conditions=data if model.conditional else None,
            # Pairs of this teacher are kept; only those of an earlier chain go.
            overwrite=True,
            progress=progress.update,
        )
