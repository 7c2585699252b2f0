"""Which training times are best: one flow per sampler, and where along the path it errs most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.snr_times import CosMap, LogitNormal, Mode
from rectiflow.flows.times import TimeSampler, Uniform
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.evaluation import Evaluator
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float

UNIFORM, BEST = "uniform", "logit-normal (0, 1)"
SAMPLERS: dict[str, TimeSampler] = {
    UNIFORM: Uniform(),
    BEST: LogitNormal(0.0, 1.0),
    "logit-normal (0.5, 0.6)": LogitNormal(0.5, 0.6),
    "mode (1.29)": Mode(1.29),
    "cosmap": CosMap(),
}


@dataclass(frozen=True)
class AblationSettings:
    """One flow per sampler and seed, all else equal."""

    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 128, "depth": 1, "time_features": 32}
    )
    """Its arguments."""
    training: TrainerSettings = field(default_factory=lambda: stage(3000))
    """Every training."""
    steps: tuple[int, ...] = (5, 50)
    """Numbers of Euler steps to score."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of weights, batches and times."""


def compare_samplers(
    settings: AblationSettings, data: ImageData, evaluator: Evaluator
) -> dict[str, list[dict[int, float]]]:
    """Fréchet distances by number of steps, for every sampler and seed."""
    found: dict[str, list[dict[int, float]]] = {name: [] for name in SAMPLERS}
    for seed in settings.seeds:
        for name, times in SAMPLERS.items():
            start = new_model(settings.net, data.shape, seed=seed, **settings.net_options)
            model = train(
                FlowMatching(start, Independent(data), times),
                replace(settings.training, seed=seed),
                title=f"times: {name}, seed {seed}",
            )
            found[name].append(
                {n: evaluator.score(model, steps=n, solver="euler").fd for n in settings.steps}
            )
    return found


def mean_ranks(distances: Mapping[str, Sequence[Mapping[int, float]]]) -> dict[str, float]:
    """The mean rank of every sampler over all seeds and numbers of steps; 1 is best.

    Example:
        >>> mean_ranks({"a": [{5: 1.0, 50: 2.0}], "b": [{5: 3.0, 50: 1.0}]})
        {'a': 1.5, 'b': 1.5}
    """
    names = list(distances)
    settings = [(s, n) for s, found in enumerate(distances[names[0]]) for n in found]
    total = dict.fromkeys(names, 0.0)
    for seed, steps in settings:
        values = {name: distances[name][seed][steps] for name in names}
        for name, own in values.items():
            better = sum(other < own for other in values.values())
            equal = sum(other == own for other in values.values())
            total[name] += better + (equal + 1) / 2
    return {name: value / len(settings) for name, value in total.items()}


@dataclass(frozen=True)
class ErrorSettings:
    """A small flow to a mixture of Gaussians, whose exact velocity is known."""

    radius: float = 2.0
    """Radius of the ring of centres."""
    std: float = 0.5
    """Standard deviation of each of the eight Gaussians."""
    width: int = 64
    """Width of the network."""
    training: TrainerSettings = field(default_factory=lambda: stage(1000, batch_size=256))
    """Its training, on uniform times."""
    count: int = 4000
    """Points for each time."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and points."""


def mixture_velocity(
    x: Float[Tensor, "b d"], t: Float[Tensor, " b"], centres: Float[Tensor, "k d"], std: float
) -> Float[Tensor, "b d"]:
    """The exact velocity from noise to equal Gaussians at the centres.

    Given the component i, state and data and noise are jointly normal: with s² = t² std² +
    (1 - t)², the velocity is `c_i + (t std² - (1 - t)) (x - t c_i) / s²`. Components weigh as
    `exp(-|x - t c_i|² / (2 s²))`.

    Example:
        >>> mixture_velocity(torch.ones(1, 1), torch.ones(1), torch.zeros(1, 1), 1.0)
        tensor([[1.]])
    """
    time = t[:, None]
    variance = (time * std).square() + (1 - time).square()
    away = x[:, None] - time[..., None] * centres
    weights = torch.softmax(-away.square().sum(2) / (2 * variance), dim=1)
    slope = (time * std**2 - (1 - time)) / variance
    return (weights[..., None] * (centres + slope[..., None] * away)).sum(1)


def errors_over_time(settings: ErrorSettings, times: Sequence[float], seed: int) -> list[float]:
    """The squared error of a trained velocity against the exact one, at every time.

    This is the loss less the part that no network can avoid.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    angles = torch.arange(8) * (math.pi / 4)
    centres = settings.radius * torch.stack([angles.cos(), angles.sin()], 1)

    def draw(count: int) -> Tensor:
        rows = torch.randint(8, (count,), generator=generator)
        return centres[rows] + settings.std * torch.randn(count, 2, generator=generator)

    start = new_model("mlp", (2,), seed=seed, width=settings.width, depth=2)
    model: FlowModel = train(
        FlowMatching(start, Independent(draw(20_000))),
        replace(settings.training, seed=seed),
        title=f"mixture, seed {seed}",
    )
    target = draw(settings.count)
    source = torch.randn(target.shape, generator=generator)
    device = device_of(model)
    found = []
    with torch.no_grad(), evaluating(model):
        for moment in times:
            t = torch.full((len(target),), moment)
            x = RectifiedPath().interpolate(source, target, t)
            exact = mixture_velocity(x, t, centres, settings.std)
            wrong = model.velocity(x.to(device), t.to(device)).cpu() - exact
            found.append(float(wrong.square().sum(1).mean()))
    return found


def middle_over_ends(times: Sequence[float], errors: Sequence[float]) -> float:
    """The error at the middle of the path over the larger one of its ends.

    Example:
        >>> middle_over_ends([0.0, 0.5, 1.0], [1.0, 3.0, 2.0])
        1.5
    """
    middle = min(range(len(times)), key=lambda i: abs(times[i] - 0.5))
    return errors[middle] / max(errors[0], errors[-1])
