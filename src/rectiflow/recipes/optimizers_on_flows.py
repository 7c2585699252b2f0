"""One flow, every optimizer: held-out loss and samples against steps and seconds.

Each optimizer trains the same network on the same pairs and times, at the best of equally many
learning rates. It asks of each paper's optimizer whether it is better than what it starts from.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectiflow.files import cache_folder
from rectiflow.flows.couplings import Draw, Independent
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.sampling import sample
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import new_model, numbers
from rectiflow.training.data import ImageData, load
from rectiflow.training.evaluation import Evaluator, Scores
from rectiflow.training.figures import bands
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.report import cell
from rectiflow.training.runs import Run
from rectiflow.training.trainer import Trainer, TrainerSettings

CLAIM = (
    "Each of these optimizers trains a flow to a lower held-out loss than the optimizer it starts "
    "from, after the same number of steps and the same tuning."
)
BASES = {
    "adamw": "adam",
    "diffgrad": "adam",
    "adamp": "adamw",
    "clipped-adam": "adam",
    "sophiag": "adamw",
    "sophiah": "adamw",
    "sgdp": "sgd",
    "clipped-sgd": "sgd",
    "splitsgd": "sgd",
    "adadagradnorm": "adadagrad",
}
"""What each optimizer is compared with."""
DECAYED = {"adamw", *(name for name, base in BASES.items() if base == "adamw")}
"""Those with weight decay."""
DIVERGED = 100.0
"""Loss of a training that diverged."""
ADAM_RATES, SGD_RATES = (1e-3, 3e-3, 1e-2), (0.1, 0.3, 1.0)
RATES: dict[str, tuple[float, ...]] = {
    "adam": ADAM_RATES,
    "adamw": ADAM_RATES,
    "diffgrad": ADAM_RATES,
    "adamp": ADAM_RATES,
    "clipped-adam": (3e-3, 1e-2, 3e-2),
    "sophiag": (3e-4, 1e-3, 3e-3),
    "sophiah": (3e-4, 1e-3, 3e-3),
    "sgd": SGD_RATES,
    "sgdp": SGD_RATES,
    "clipped-sgd": (1.0, 3.0, 10.0),
    "splitsgd": SGD_RATES,
    "adadagrad": (3e-3, 1e-2, 3e-2),
    "adadagradnorm": (0.3, 1.0, 3.0),
}


def _training() -> TrainerSettings:
    optim = OptimizerSettings(schedule="cosine", warmup=40)
    return TrainerSettings(steps=800, batch_size=128, ema=0.99, optim=optim)


@dataclass(frozen=True)
class Settings:
    """One training, many optimizers."""

    data: str = "digits"
    """Images, by spec string."""
    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 192, "depth": 2, "time_features": 32}
    )
    """Its arguments."""
    training: TrainerSettings = field(default_factory=_training)
    """The training; only name and rate of its optimizer change."""
    decay: float = 0.1
    """Weight decay of AdamW and of what starts from it."""
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: dict(RATES))
    """Learning rates tried, equally many for each optimizer."""
    looks: int = 8
    """How often held-out losses are taken in a training."""
    samples: int = 1000
    """Samples for a Fréchet distance."""
    sample_steps: int = 20
    """Euler steps that make them."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose the rates."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and noises."""

    def __post_init__(self) -> None:
        if len({len(grid) for grid in self.rates.values()}) != 1:
            raise ValueError("every optimizer must be given equally many learning rates to try")


PRESETS = {
    "quick": Settings(
        net_options={"width": 16, "depth": 1, "time_features": 8},
        training=replace(_training(), steps=8, batch_size=32),
        rates={name: (RATES[name][1],) for name in ("adam", "adamw", "sophiag", "sgd", "sgdp")},
        looks=2,
        samples=64,
        sample_steps=2,
        tuning_seeds=(),
        seeds=(0,),
    ),
    "default": Settings(),
    "paper": Settings(
        data="hub:cifar10",
        net="unet-cifar10",
        net_options={},
        training=replace(_training(), steps=100_000, ema=0.9999),
        samples=50_000,
    ),
}


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        looks: steps at which the held-out loss was taken.
        losses: the held-out loss of the averaged weights at each.
        seconds: seconds of training until each, without the looking; NaN if it diverged.
        scores: of samples at the end; None while tuning and if it diverged.
    """

    looks: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    scores: Scores | None = None

    @property
    def diverged(self) -> bool:
        """Whether it ended with a loss that counts as not finite."""
        return self.losses[-1] >= DIVERGED


class _HeldOut:
    """Takes the loss of the averaged model on fixed pairs and times, and stops the clock for it."""

    def __init__(self, data: ImageData, settings: Settings) -> None:
        self.data = Independent(data)
        self.count = min(2000, 4 * len(data))
        self.due = tuple(
            round(settings.training.steps * (k + 1) / settings.looks) for k in range(settings.looks)
        )
        self.looks: list[int] = []
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._paused, self._began = 0.0, time.perf_counter()

    @torch.no_grad()
    def __call__(self, trainer: Trainer, step: int) -> None:
        if step not in self.due:
            return
        now = time.perf_counter()
        self.looks.append(step)
        self.seconds.append(now - self._began - self._paused)
        method = FlowMatching(trainer.result(), self.data)
        generator = torch.Generator(device_of(method.model))
        self.losses.append(float(method.loss(Draw.of(self.count, seed=7, generator=generator))))
        trainer.method.model.train()
        self._paused += time.perf_counter() - now


def run(settings: Settings, run: Run) -> Result:
    """Tune, train and score every optimizer."""
    images, held = (load(settings.data, split=split) for split in ("train", "test"))
    images, held = (replace(data, labels=None, classes=()) for data in (images, held))
    evaluator = Evaluator(
        load(settings.data, split="train"),
        load(settings.data, split="test"),
        count=settings.samples,
        cache=cache_folder(),
    )
    chosen, arms = {}, {}
    for name, grid in settings.rates.items():
        chosen[name] = _best(settings, name, grid, images, held)
        arms[name] = [
            _train(settings, name, chosen[name], seed, images, held, evaluator)
            for seed in settings.seeds
        ]
    diverged = [
        f"{name} ({sum(one.diverged for one in found)})"
        for name, found in arms.items()
        if any(one.diverged for one in found)
    ]
    return Result(
        slug="optimizers-on-flows",
        claim=CLAIM,
        numbers=_numbers(arms, evaluator),
        checks=_checks(arms),
        seeds=settings.seeds,
        notes=[
            f"{len(next(iter(settings.rates.values())))} rates tried for each optimizer on "
            f"{len(settings.tuning_seeds)} other seeds by the loss on the test images that judge, "
            f"everything else at its defaults but a weight decay of {settings.decay:g} for "
            f"{', '.join(name for name in chosen if name in DECAYED)}; chosen: "
            + ", ".join(f"{name} {rate:g}" for name, rate in chosen.items())
            + ".",
            f"{settings.training.steps} steps of {settings.training.batch_size} on "
            f"{images.name}; held-out loss of the averaged weights on {len(held)} test images at "
            "fixed noises and times. Adam, AdamW and SGD are torch's fused kernels; the others run "
            "uncompiled.",
            *(
                ["An MLP has no normalisation, so AdamP and SGDP find nothing to project."]
                if settings.net == "mlp"
                else []
            ),
            *(
                [f"Trainings that diverged count as a loss of 100: {', '.join(diverged)}."]
                if diverged
                else []
            ),
        ],
        pictures=_draw(settings, arms, run),
    )


def _best(
    settings: Settings, name: str, grid: Sequence[float], images: ImageData, held: ImageData
) -> float:
    if len(grid) == 1:
        return grid[0]
    return min(
        grid,
        key=lambda rate: statistics.fmean(
            _train(settings, name, rate, seed, images, held).losses[-1]
            for seed in settings.tuning_seeds
        ),
    )


def _train(
    settings: Settings,
    name: str,
    rate: float,
    seed: int,
    images: ImageData,
    held: ImageData,
    evaluator: Evaluator | None = None,
) -> Trained:
    """One training; a loss that is not finite counts as 100."""
    from rectiflow.errors import NonFiniteLossError

    start = new_model(settings.net, images.shape, seed=seed, **settings.net_options)
    decay = settings.decay if name in DECAYED else settings.training.optim.weight_decay
    optim = replace(settings.training.optim, name=name, learning_rate=rate, weight_decay=decay)
    training = replace(settings.training, seed=seed, optim=optim)
    watch = _HeldOut(held, settings)
    method = FlowMatching(start, Independent(images))
    try:
        model = Trainer(method, training, title=f"{name} {rate:g}", callbacks=[watch]).fit()
    except NonFiniteLossError:
        count = len(watch.due)
        return Trained(watch.due, (DIVERGED,) * count, (math.nan,) * count)
    scores = _scores(settings, model, evaluator) if evaluator is not None else None
    losses = tuple(loss if loss < DIVERGED else DIVERGED for loss in watch.losses)
    return Trained(tuple(watch.looks), losses, tuple(watch.seconds), scores)


def _scores(settings: Settings, model: FlowModel, evaluator: Evaluator) -> Scores:
    source, _ = evaluator.noises(model)
    made: Tensor = sample(model, source=source, steps=settings.sample_steps, solver="euler")
    return evaluator.compare(made)


def _numbers(arms: Mapping[str, Sequence[Trained]], evaluator: Evaluator) -> list[Number]:
    looks = arms["adam"][0].looks
    half = looks[(len(looks) - 1) // 2]
    adam = statistics.fmean(one.seconds[-1] for one in arms["adam"])

    def distance(one: Trained) -> float:
        return math.nan if one.scores is None else one.scores.fd

    return numbers(
        arms,
        {
            f"held-out loss at step {half}": lambda one: one.losses[one.looks.index(half)],
            "held-out loss at the end": lambda one: one.losses[-1],
            evaluator.name: distance,
            "seconds of training / Adam's": lambda one: one.seconds[-1] / adam,
        },
    )


def _checks(arms: Mapping[str, Sequence[Trained]]) -> list[Check]:
    """Each against what it starts from, seed by seed; one per cent worse on the mean refutes it.

    The same loss is not lower, and a base that diverged says nothing.
    """

    def quotient(one: Trained, base: Trained) -> float:
        return math.nan if base.diverged else one.losses[-1] / base.losses[-1]

    return [
        Check(
            f"held-out loss at the end, {name} / {base}",
            tuple(map(quotient, arms[name], arms[base])),
            at_most=0.999,
            broken=1.01,
        )
        for name, base in BASES.items()
        if name in arms and base in arms
    ]


def _draw(settings: Settings, arms: Mapping[str, Sequence[Trained]], run: Run) -> dict[Path, str]:
    """Held-out losses over steps and over seconds."""
    steps = bands(
        {
            name: (found[0].looks, [list(one.losses) for one in found])
            for name, found in arms.items()
        },
        run.path("steps.png"),
        across="training steps",
        up="held-out loss",
        logarithmic="y",
    )
    seconds = {}
    for name, found in arms.items():
        clock = [statistics.fmean(column) for column in zip(*(one.seconds for one in found))]
        seconds[name] = (clock, [list(one.losses) for one in found])
    times = bands(
        seconds,
        run.path("seconds.png"),
        across="seconds of training",
        up="held-out loss",
        logarithmic="y",
    )
    order = sorted(arms, key=lambda name: statistics.fmean(one.losses[-1] for one in arms[name]))
    best = ", ".join(
        f"{name} {cell(statistics.fmean(one.losses[-1] for one in arms[name]))}"
        for name in order[:3]
    )
    return {
        steps: f"Held-out loss over {settings.training.steps} steps; lowest at the end: {best}.",
        times: "The same over the seconds of training.",
    }
