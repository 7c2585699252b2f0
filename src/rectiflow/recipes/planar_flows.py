"""Flows in the plane: a ring of Gaussians on straight and curved paths, before and after reflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rectiflow.distill.generation import generate_pairs
from rectiflow.distill.reflow import Reflow
from rectiflow.flows.couplings import Independent, StoredPairs
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.integration import Trajectory
from rectiflow.flows.metrics import energy_distance, straightness, transport_cost, velocity_loss
from rectiflow.flows.paths import Path, RectifiedPath
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float

PATHS: dict[str, Path] = {"straight": RectifiedPath(), "VP": VariancePreservingPath()}


@dataclass(frozen=True)
class PlanarSettings:
    """The experiment in the plane."""

    radius: float = 4.0
    """Radius of the ring of eight Gaussians."""
    std: float = 0.15
    """Standard deviation of each."""
    points: int = 20_000
    """Training points."""
    width: int = 64
    """Width of the network."""
    depth: int = 2
    """Its residual blocks."""
    flow: TrainerSettings = field(default_factory=lambda: stage(2500, batch_size=256))
    """The first flow."""
    reflow: TrainerSettings = field(default_factory=lambda: stage(1000, batch_size=256))
    """Reflow."""
    pairs: int = 8000
    """Pairs for reflow."""
    steps: int = 100
    """Euler steps of pairs and of careful sampling."""
    count: int = 4000
    """Samples measured."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights, batches and noises."""


@dataclass(frozen=True)
class PlanarScores:
    """One flow, measured.

    Attributes:
        straightness: S.
        cost: mean squared distance of noise and sample.
        one_step: energy distance to the data of samples made in one Euler step.
        many_steps: the same in many.
        gap: how far the fall of the cost by this flow is from S + V, as a part of the cost before.
        paths: states of a few noises along their paths.
    """

    straightness: float
    cost: float
    one_step: float
    many_steps: float
    gap: float
    paths: list[Tensor]


def ring(
    count: int, *, radius: float, std: float, generator: torch.Generator
) -> Float[Tensor, "count 2"]:
    """Points of eight equal Gaussians whose centres lie evenly on a circle.

    Example:
        >>> made = ring(100, radius=4.0, std=0.0, generator=torch.Generator().manual_seed(0))
        >>> bool((made.norm(dim=1) - 4).abs().max() < 1e-5)
        True
    """
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centre = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + std * torch.randn(count, 2, generator=generator)


def rectify_in_the_plane(
    settings: PlanarSettings, path: Path, seed: int, folder: FilePath
) -> tuple[PlanarScores, PlanarScores]:
    """Train a flow to the ring, reflow it on the same path, and score both.

    Args:
        settings: sizes.
        path: the path of both flows.
        seed: of everything but the data.
        folder: receives the pairs.
    """
    generator = torch.Generator().manual_seed(0)
    shape = {"radius": settings.radius, "std": settings.std}
    points = ring(settings.points, generator=generator, **shape)
    fresh = ring(settings.count, generator=generator, **shape)
    size = {"width": settings.width, "depth": settings.depth}
    start = new_model("mlp", (2,), seed=seed, path=path, **size)
    first = train(
        FlowMatching(start, Independent(points)),
        replace(settings.flow, seed=seed),
        title=f"ring, {path.name}",
    )
    store = generate_pairs(
        first, folder, settings.pairs, steps=settings.steps, seed=seed + 1, overwrite=True
    )
    second = train(
        Reflow(first, StoredPairs(store)),
        replace(settings.reflow, seed=seed),
        title=f"ring, {path.name}, reflow",
    )
    source, target, _ = store.rows(torch.arange(min(len(store), settings.count)))
    independent = draw_source(first, len(fresh), generator=generator).cpu()
    return (
        _score(first, settings, fresh, coupling=(independent, fresh)),
        _score(second, settings, fresh, coupling=(source, target)),
    )


def _score(
    model: FlowModel, settings: PlanarSettings, fresh: Tensor, coupling: Sequence[Tensor]
) -> PlanarScores:
    """Measures of one model; `coupling` is fresh pairs of what it was trained on."""
    # The same noises for every model of every seed.
    source = draw_source(model, settings.count, generator=torch.Generator().manual_seed(1234))
    made = {
        steps: sample(model, source=source, steps=steps, solver="euler")
        for steps in (1, settings.steps)
    }
    many = made[settings.steps]
    straight = straightness(model, source, settings.steps).total
    given = [end.to(source) for end in coupling]
    before = transport_cost(given[0], given[1])
    fall = before - transport_cost(source, many)
    explained = straight + velocity_loss(model, given[0], given[1], settings.steps)
    seen = Trajectory()
    sample(model, source=source[:80], steps=settings.steps, solver="euler", correctors=(seen,))
    return PlanarScores(
        straightness=straight,
        cost=transport_cost(source, many),
        one_step=energy_distance(made[1].cpu(), fresh),
        many_steps=energy_distance(many.cpu(), fresh),
        gap=abs(fall - explained) / before,
        paths=[state.cpu() for state in seen.states],
    )
