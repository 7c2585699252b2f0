"""What recipes share: seeded models, short trainings, numbers by arm and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rectiflow.flows.fields import FlowModel
from rectiflow.flows.paths import Path
from rectiflow.nets import build
from rectiflow.recipes.recipe import Number
from rectiflow.training.method import Method
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.trainer import Trainer, TrainerSettings


def stage(
    steps: int, *, batch_size: int = 128, learning_rate: float = 1e-3, ema: float = 0.999
) -> TrainerSettings:
    """A short training at a rate that falls to zero.

    Example:
        >>> stage(100).optim.schedule
        'cosine'
    """
    optim = OptimizerSettings(learning_rate=learning_rate, schedule="cosine")
    return TrainerSettings(steps=steps, batch_size=batch_size, ema=ema, optim=optim)


def new_net(name: str, *, seed: int, **config: Any) -> torch.nn.Module:
    """A network whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name, **config)


def new_model(
    name: str, shape: Sequence[int], *, seed: int, path: Path | None = None, **config: Any
) -> FlowModel:
    """An untrained model of a net by name.

    Example:
        >>> new_model("mlp", (2,), seed=0, width=8, depth=1).shape
        (2,)
    """
    return FlowModel(new_net(name, seed=seed, shape=shape, **config), path, shape=shape)


def train(method: Method, settings: TrainerSettings, *, title: str) -> FlowModel:
    """Train without writing anything; returns the averaged model."""
    return Trainer(method, settings, title=title).fit()


def numbers(
    arms: Mapping[str, Sequence[Any]], measures: Mapping[str, Callable[[Any], float]]
) -> list[Number]:
    """Every measure of every arm.

    Args:
        arms: arm to what was measured, one record a seed.
        measures: quantity to the function that reads it from a record.

    Example:
        >>> numbers({"method": [1, 2], "baseline": [3, 4]}, {"double": lambda x: 2 * x})[0]
        Number(quantity='double', arm='method', values=(2.0, 4.0))
    """
    return [
        Number(quantity, arm, tuple(float(measure(record)) for record in records))
        for quantity, measure in measures.items()
        for arm, records in arms.items()
    ]


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    """Quotients seed by seed; infinite or NaN where the divisor is 0.

    Example:
        >>> ratios([4.0, 1.0], [2.0, 0.0])
        (2.0, inf)
    """
    top = torch.tensor(list(above), dtype=torch.float64)
    return tuple((top / torch.tensor(list(below), dtype=torch.float64)).tolist())


def standard_errors(above: Sequence[float], below: Sequence[float]) -> float:
    """The mean of differences seed by seed, in standard errors of that mean.

    Signed infinity if all differences are the same; NaN for a single seed or where all are 0. Where
    `below` is infinite on a seed, and `above` nowhere, minus infinity; NaN where `above` is: what
    is better than a training that diverged need not be good.

    Example:
        >>> round(standard_errors([3.0, 4.0, 5.0], [1.0, 1.0, 1.0]), 3)
        5.196
    """
    differences = [a - b for a, b in zip(above, below, strict=True)]
    if len(differences) < 2:
        return math.nan
    if not all(map(math.isfinite, differences)):
        return -math.inf if sum(differences) == -math.inf else math.nan
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    if error:
        return mean / error
    return math.copysign(math.inf, mean) if mean else math.nan


def shifted_mean(values: Sequence[float], errors: float) -> float:
    """The mean plus so many of its standard errors; a single value as it is, NaN unless finite.

    Example:
        >>> round(shifted_mean([1.0, 2.0, 3.0], -2), 4)
        0.8453
    """
    if not all(map(math.isfinite, values)):
        return math.nan
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean
    return mean + errors * statistics.stdev(values) / len(values) ** 0.5
