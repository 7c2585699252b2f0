"""Reflow from a diffusion model: does a denoiser's start save training steps?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.reflow import Reflow
from rectiflow.flows.couplings import StoredPairs
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.premetrics import PseudoHuber
from rectiflow.flows.sampling import sample
from rectiflow.flows.u_shaped import UShaped
from rectiflow.interop.edm import edm_times, from_edm
from rectiflow.recipes.tools import new_net, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.denoising import Denoising
from rectiflow.training.evaluation import Evaluator
from rectiflow.training.trainer import Trainer, TrainerSettings

ARMS = ("diffusion start", "random start")


@dataclass(frozen=True)
class StartSettings:
    """The experiment."""

    denoise: TrainerSettings = field(default_factory=lambda: stage(2500))
    """Training of the denoiser, which is the teacher."""
    reflow: TrainerSettings = field(default_factory=lambda: stage(1200))
    """Reflow from either start, on the same pairs."""
    pairs: int = 8000
    """Pairs."""
    solver_steps: int = 18
    """Noise strengths of EDM's grid, followed by Heun's method, for pairs."""
    looks: int = 12
    """How often the one-step distance is measured on the way."""
    sigma_data: float = 0.7
    """Standard deviation of the data in EDM's preconditioning."""


@dataclass(frozen=True)
class Start:
    """One seed.

    Attributes:
        steps: training steps at which the distance was measured.
        distance: one-step Fréchet distance at those, by arm.
        teacher: the distance of the denoiser itself, as a flow of many steps.
    """

    steps: tuple[int, ...]
    distance: Mapping[str, Sequence[float]]
    teacher: float

    @property
    def share(self) -> float:
        """Steps until the diffusion start is as good as the random one ends, as a part of all."""
        wanted = self.distance[ARMS[1]][-1]
        reached = (n for n, d in zip(self.steps, self.distance[ARMS[0]]) if d <= wanted)
        # Never reached: twice the steps stand for "more".
        return next(reached, 2 * self.steps[-1]) / self.steps[-1]


def compare_starts(
    settings: StartSettings,
    data: ImageData,
    evaluator: Evaluator,
    make: Callable[[], dict[str, Any]],
    seed: int,
    folder: Path,
) -> Start:
    """Train a denoiser, make pairs with it, and reflow on them from it and from nothing.

    Args:
        settings: sizes.
        data: unlabelled images.
        evaluator: measures distances.
        make: name and arguments of the network, without its shape.
        seed: of weights, batches and pairs.
        folder: receives the pairs.
    """

    def untrained(first: int) -> FlowModel:
        net = new_net(seed=first, shape=data.shape, **make())
        return from_edm(net, shape=data.shape, sigma_data=settings.sigma_data)

    teacher = train(
        Denoising(untrained(seed), data), replace(settings.denoise, seed=seed), title="denoise"
    )
    store = generate_pairs(
        teacher,
        folder,
        settings.pairs,
        solver="heun",
        steps=edm_times(settings.solver_steps),
        seed=seed + 1,
        overwrite=True,
    )
    starts = dict(zip(ARMS, (teacher, untrained(seed + 1))))
    steps: tuple[int, ...] = ()
    distance = {}
    for arm, start in starts.items():
        steps, distance[arm] = _reflow(start, StoredPairs(store), settings, evaluator, seed, arm)
    source, _ = evaluator.noises(teacher)
    grid = edm_times(settings.solver_steps)
    many = sample(teacher, source=source, steps=grid, solver="heun")
    return Start(steps, distance, evaluator.compare(many).fd)


def _reflow(
    start: FlowModel,
    pairs: StoredPairs,
    settings: StartSettings,
    evaluator: Evaluator,
    seed: int,
    arm: str,
) -> tuple[tuple[int, ...], list[float]]:
    """One-step distances on the way of a reflow."""
    source, _ = evaluator.noises(start)
    seen: dict[int, float] = {}
    every = max(1, settings.reflow.steps // settings.looks)

    @torch.no_grad()
    def look(trainer: Trainer, step: int) -> None:
        if step % every == 0:
            made = sample(trainer.result(), source=source, steps=1, solver="euler")
            seen[step] = evaluator.compare(made).fd
            trainer.method.model.train()

    method = Reflow(start, pairs, times=UShaped(), premetric=PseudoHuber())
    options = replace(settings.reflow, seed=seed)
    Trainer(method, options, title=f"reflow, {arm}", callbacks=[look]).fit()
    return tuple(seen), list(seen.values())
