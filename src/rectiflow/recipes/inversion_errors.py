"""How well solvers invert: their orders on a known field, images reconstructed by a trained one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.integration import integrate, uniform_times
from rectiflow.images import round_trip
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float

SOLVERS = {"RF-Solver": "rf-solver", "Euler": "euler", "implicit midpoint": "implicit-midpoint:3"}
# Evaluations a step.
COSTS = {"RF-Solver": 2, "Euler": 1, "implicit midpoint": 4}
# Round-trip errors of the released code on the field below, by number of steps.
RELEASED = {5: 1.86e-3, 15: 6.6e-5}


@dataclass(frozen=True)
class Orders:
    """Exponents at which errors fall with the length of the step.

    Attributes:
        one_way: of the state at the other end.
        trip: of the state after a way there and back on the same grid.
        lost: largest error after a round trip, by number of steps.
    """

    one_way: float
    trip: float
    lost: dict[int, float]


def known_field(x: Float[Tensor, "n 1"], t: Float[Tensor, " n"]) -> Float[Tensor, "n 1"]:
    """A smooth field in one dimension whose trajectories bend."""
    return 0.7 * x - 0.4 * torch.sin(3 * x) + torch.cos(2 * t)[:, None]


def orders(solver: str) -> Orders:
    """Measure a solver on the known field, in float64."""
    # With these ten points the released code was measured.
    x = torch.sin(0.37 * torch.arange(10, dtype=torch.float64)).unsqueeze(1)
    exact = integrate(known_field, x, 512, "rk4")

    def errors(steps: int) -> tuple[float, float]:
        there = integrate(known_field, x, steps, solver)
        back = integrate(known_field, there, uniform_times(steps, start=1, stop=0), solver)
        return float((there - exact).abs().max()), float((back - x).abs().max())

    coarse, fine = errors(32), errors(64)
    slopes = [math.log2(a / b) for a, b in zip(coarse, fine)]
    return Orders(slopes[0], slopes[1], {steps: errors(steps)[1] for steps in RELEASED})


@dataclass(frozen=True)
class InversionSettings:
    """A class-conditional flow whose held-out images are inverted and reconstructed."""

    net: str = "mlp"
    """Network."""
    net_options: Mapping[str, Any] = field(default_factory=lambda: {"width": 256, "depth": 3})
    """Its arguments."""
    training: TrainerSettings = field(default_factory=lambda: stage(3000))
    """Its training."""
    budgets: tuple[int, ...] = (10, 20, 40, 60)
    """Evaluations each way."""
    images: int = 200
    """Held-out images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""


def reconstructions(
    settings: InversionSettings, data: ImageData, held: ImageData, seed: int
) -> dict[str, dict[int, float]]:
    """By solver and evaluations each way: the mean squared error of reconstructed images."""
    classes = len(data.classes)
    start = new_model(settings.net, data.shape, seed=seed, classes=classes, **settings.net_options)
    model: FlowModel = train(
        FlowMatching(start, Independent(data), condition_dropout=0.1),
        replace(settings.training, seed=seed),
        title=f"flow to invert, seed {seed}",
    )
    rows = range(min(settings.images, len(held)))
    device = device_of(model)
    images = held.batch(list(rows)).to(device)
    condition = {name: value.to(device) for name, value in held.condition(list(rows)).items()}
    found: dict[str, dict[int, float]] = {}
    for name, solver in SOLVERS.items():
        found[name] = {}
        for budget in settings.budgets:
            steps = max(1, budget // COSTS[name])
            errors = round_trip(model, images, steps=steps, solver=solver, **condition).error
            found[name][budget] = float(errors.double().square().mean())
    return found


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of images in [-1, 1].

    Example:
        >>> psnr(0.04)
        20.0
    """
    return round(10 * math.log10(4 / max(error, 1e-12)), 4)


def gains(found: Mapping[str, Mapping[int, float]], budgets: Sequence[int]) -> list[float]:
    """dB by which RF-Solver's reconstructions are better than Euler's."""
    return [psnr(found["RF-Solver"][b]) - psnr(found["Euler"][b]) for b in budgets]
