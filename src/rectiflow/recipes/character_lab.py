"""Trainings on characters, and what several optimizers would do along one of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rectiflow.diagnose import (
    Shadows,
    best_step,
    directional_sharpness,
    heavy_coordinates,
    paper_shadows,
)
from rectiflow.optim import Adam, CoordinateClipped, Momentum, SplitSGD, chain
from rectiflow.recipes.characters import CharacterModel, Characters, standard_library
from rectiflow.training.progress import bar

SGD, SGD_CLIPPED, ADAM, ADAM_CLIPPED = "SGD", "SGD, clipped", "Adam", "Adam, clipped"
SPLIT = "SplitSGD"
TUNING = 100
"""Seed on which learning rates are chosen."""
LAST = 50
"""Steps at the end over which a training's loss is averaged."""


def optimizer(name: str, params: Any, rate: float) -> torch.optim.Optimizer:
    """An arm of the comparison. SGD's momentum is a mean of gradients (dampening)."""
    mean = Momentum(0.9, 0.9)
    if name == SGD:
        return chain(mean)(params, lr=rate)
    if name == SGD_CLIPPED:
        return CoordinateClipped(params, mean, rate, fraction=0.1)
    if name == SPLIT:
        return SplitSGD(params, rate, fraction=0.1, ratio=3e-3)
    if name == ADAM:
        return chain(Adam())(params, lr=rate)
    return CoordinateClipped(params, "adam", rate, fraction=0.5)


@dataclass(frozen=True)
class NetSettings:
    """A network and its batches."""

    width: int = 48
    """Size of a character's vector."""
    depth: int = 2
    """Blocks."""
    heads: int = 4
    """Heads of attention."""
    length: int = 48
    """Characters read."""
    batch_size: int = 32
    """Windows of a step."""

    def build(self, text: Characters, seed: int) -> CharacterModel:
        """A new model for a text."""
        return CharacterModel(
            len(text.alphabet),
            length=self.length,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            seed=seed,
        )


@dataclass(frozen=True)
class Look:
    """Directions at one point of a real training.

    Attributes:
        sharpness: S by optimizer.
        cosine: cosine with the held-out gradient, by optimizer.
        decrease: how far one best step lowers the held-out loss, by optimizer.
        energy: part of the squared gradient in its largest tenth of coordinates.
    """

    sharpness: dict[str, float]
    cosine: dict[str, float]
    decrease: dict[str, float]
    energy: float


def follow(
    text: Characters,
    net: NetSettings,
    real: str,
    rate: float,
    looks: Sequence[int],
    *,
    held_out: int,
    seed: int,
) -> dict[int, Look]:
    """One real training with the shadows of all optimizers: what they would do, by step.

    Args:
        text: what is learned.
        net: the network.
        real: the optimizer that moves the weights.
        rate: its learning rate.
        looks: the steps at which directions are compared.
        held_out: number of held-out windows on which they are.
        seed: of weights and windows.
    """
    model = net.build(text, seed)
    generator = torch.Generator().manual_seed(seed)
    windows = text.windows(held_out, net.length, held_out=True, generator=generator)
    mover = optimizer(real, model.parameters(), rate)
    shadows = Shadows(model.parameters(), paper_shadows())
    found = {}
    with bar(f"{real}, seed {seed}", max(looks)) as progress:
        for step in range(1, max(looks) + 1):
            backward(model, text, net, generator)
            shadows.follow()
            if step in looks:
                found[step] = look(model, shadows.directions, windows)
            mover.step()
            progress.update(step)
    return found


def backward(
    model: CharacterModel, text: Characters, net: NetSettings, generator: torch.Generator
) -> float:
    """Gradients of a new batch, in `p.grad`; its loss."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(text.windows(net.batch_size, net.length, generator=generator))
    loss.backward()
    return float(loss.detach())


def look(model: CharacterModel, directions: Mapping[str, Tensor], held_out: Tensor) -> Look:
    """All directions at the present weights, on held-out windows."""
    sharpness, cosines, decrease = {}, {}, {}
    for name, direction in directions.items():
        measured = (model.loss, list(model.parameters()), direction.float(), [held_out])
        found = directional_sharpness(*measured, module=model)
        sharpness[name], cosines[name] = found.sharpness, found.cosine
        reach = 2 * found.best_distance
        reach = reach if 0 < reach < math.inf else 1.0
        decrease[name] = best_step(*measured, reach=reach, module=model).best_decrease
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Look(sharpness, cosines, decrease, heavy_coordinates(gradients, 0.1).energy)


@dataclass(frozen=True)
class RaceSettings:
    """Trainings of several optimizers, each at the best of its learning rates."""

    grids: Mapping[str, tuple[float, ...]]
    """Learning rates of each, equally many, all tried on one seed of their own."""
    characters: int = 600_000
    """Length of the text."""
    net: NetSettings = field(default_factory=lambda: NetSettings(width=32, depth=1, batch_size=16))
    """The network."""
    steps: int = 600
    """Steps of each training."""


@dataclass(frozen=True)
class Tuned:
    """One arm of a race.

    Attributes:
        rate: the chosen learning rate.
        tried: loss by learning rate on the tuning seed; infinite where it diverged.
        losses: one loss a seed.
    """

    rate: float
    tried: dict[float, float]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:g}" for rate in self.tried)
        edge = len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))
        return f"{rates} (best {self.rate:g}{', at the edge' if edge else ''})"


def race(settings: RaceSettings, seeds: Sequence[int]) -> dict[str, Tuned]:
    """Train with every learning rate on a seed of its own, then with the best one on all seeds."""
    text, found = standard_library(settings.characters), {}
    for name, grid in settings.grids.items():
        with bar(f"{name} by itself", len(grid) + len(seeds), unit="trainings") as progress:

            def loss(rate: float, seed: int, name: str = name, progress: Any = progress) -> float:
                value = train(text, settings.net, name, rate, steps=settings.steps, seed=seed)
                progress.update(progress.done + 1)
                return value

            tried = {rate: loss(rate, TUNING) for rate in grid}
            best = min(tried, key=tried.__getitem__)
            found[name] = Tuned(best, tried, tuple(loss(best, seed) for seed in seeds))
    return found


def told(found: Mapping[str, Tuned]) -> str:
    """The learning rates that were tried, for a note."""
    grids = "; ".join(f"{name}: {arm}" for name, arm in found.items())
    return f"Learning rates tried on seed {TUNING}: {grids}."


def lost(found: Mapping[str, Tuned]) -> list[str]:
    """A note on the arms that diverged, if there are any."""
    counts = {name: sum(not math.isfinite(x) for x in arm.losses) for name, arm in found.items()}
    arms = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    note = f"Arms that diverged at their best rate, with the number of seeds: {arms}."
    return [note] if arms else []


def train(
    text: Characters, net: NetSettings, name: str, rate: float, *, steps: int, seed: int
) -> float:
    """The mean loss of the last steps of a training; infinite if it was not finite."""
    model = net.build(text, seed)
    generator = torch.Generator().manual_seed(seed)
    mover = optimizer(name, model.parameters(), rate)
    losses = []
    for _ in range(steps):
        losses.append(backward(model, text, net, generator))
        if not math.isfinite(losses[-1]):
            return math.inf
        mover.step()
    return statistics.fmean(losses[-LAST:])
