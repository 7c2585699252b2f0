"""AdAdaGrad: batches that grow with the gradient's noise, against constant ones of every size.

A small network on small garments, AdaGrad at a rate tuned alike for each arm, and the same number
of samples for all: growing batches take fewer steps. Whether they also generalise better than
chance would have it shows against a constant batch of their own average size, which takes as many
steps. The paper trains on MNIST, CIFAR-10 and ImageNet with residual networks.

Source: arXiv 2402.11215, section 5.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.optim import (
    AdAdaGrad,
    BatchSizeController,
    BatchTest,
    InnerProductTest,
    NormTest,
    ResizableBatches,
    per_sample_statistics,
)
from rectiflow.recipes.classifier_lab import best_rate
from rectiflow.recipes.recipe import Check, Result
from rectiflow.recipes.tools import numbers, shifted_mean
from rectiflow.training.data import load
from rectiflow.training.figures import bands, curves
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "A batch that grows when the variance of its gradient asks for it takes far fewer steps than a "
    "small constant one and generalises better than a large one, at the same number of samples."
)
AVERAGE = "constant, the average of the norm test"


@dataclass(frozen=True)
class Settings:
    """One experiment."""

    data: str = "fashion-mnist"
    """Labelled images, by spec string."""
    size: int | None = 14
    """Side in pixels; None keeps that of the data."""
    train: int = 12_000
    """Images trained on, from the first."""
    width: int = 64
    """Hidden units."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Learning rates tried for each arm."""
    budget: int = 240_000
    """Samples of one training."""
    constant: tuple[int, ...] = (16, 512)
    """Constant batches, besides the largest and the average one. The first is judged by its steps
    alone and trained once, untuned."""
    b_min: int = 16
    """The first batch of those that grow."""
    b_max: int = 4096
    """The largest."""
    eta: float = 0.5
    """The norm test's that the claim is judged by: the released code's for AdaGrad."""
    others: tuple[float, ...] = (0.1, 0.25, 1.0)
    """More of them."""
    interval: int = 10
    """Steps between tests."""
    tested: int = 512
    """Most samples that a test looks at."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose the rate of an arm."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""


PRESETS = {
    "quick": Settings(
        data="digits",
        size=None,
        train=1000,
        width=16,
        rates=(0.03,),
        budget=6_000,
        constant=(16,),
        b_max=512,
        others=(),
        tested=64,
        seeds=(0,),
    ),
    "default": Settings(),
    # The paper's samples and batches for CIFAR-10, on a wider network than ours.
    "paper": Settings(
        data="hub:cifar10",
        size=None,
        train=50_000,
        width=1024,
        rates=(0.005, 0.05, 0.5),
        budget=10_000_000,
        constant=(8, 512),
        b_min=8,
        b_max=50_000,
        interval=1,
        tested=2000,
    ),
}


@dataclass(frozen=True)
class Trained:
    """What one training gave.

    Attributes:
        accuracy: on the test images.
        steps: updates.
        sizes: samples seen before, and the batch then, wherever it changed.
        share: part of the time that went into tests.
    """

    accuracy: float
    steps: int
    sizes: tuple[tuple[int, int], ...]
    share: float


def run(settings: Settings, run: Run) -> Result:
    """The arms, the checks and the pictures."""
    data = _images(settings)
    arms: dict[str, list[Trained]] = {}
    rates: dict[str, float] = {}

    def add(name: str, batch: int, rule: BatchTest | None, *, once: bool = False) -> None:
        middle = len(settings.rates) // 2
        grid = settings.rates[middle : middle + 1] if once else settings.rates
        seeds = settings.seeds[:1] if once else settings.seeds
        tried = len(grid) * len(settings.tuning_seeds) if len(grid) > 1 else 0
        with bar(name, tried + len(seeds), unit="trainings") as progress:

            def trained(rate: float, seed: int) -> Trained:
                found = _train(batch, rule, rate, settings, data, seed)
                progress.update(progress.done + 1)
                return found

            def score(rate: float, seed: int) -> float:
                progress.update(progress.done + 1)
                return _train(batch, rule, rate, settings, data.tuning(), seed).accuracy

            rates[name] = best_rate(grid, settings.tuning_seeds, score)
            arms[name] = [trained(rates[name], seed) for seed in seeds]

    first, *more = settings.constant
    add(_constant(first), first, None, once=True)
    for batch in (*more, settings.b_max):
        add(_constant(batch), batch, None)
    rules: dict[str, BatchTest] = {
        _norm(eta): NormTest(eta) for eta in (*settings.others, settings.eta)
    }
    rules["augmented inner-product test"] = InnerProductTest(0.5, nu=1.0)
    for name, rule in rules.items():
        add(name, settings.b_min, rule)
    chosen = arms[_norm(settings.eta)]
    average = round(statistics.fmean(settings.budget / one.steps for one in chosen))
    add(AVERAGE, average, None)
    return Result(
        slug="adadagrad",
        claim=CLAIM,
        numbers=numbers(
            arms,
            {
                "test accuracy": lambda one: one.accuracy,
                "steps": lambda one: one.steps,
                "share of the time spent on tests": lambda one: one.share,
            },
        ),
        checks=_checks(arms, settings),
        seeds=settings.seeds,
        notes=[
            f"{settings.budget:,} samples each, AdaGrad at the best of {len(settings.rates)} rates "
            f"on {len(settings.tuning_seeds)} other seed and a fifth of the training images: "
            + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
            + f". The constant batch {first} counts by its steps and is trained once, untuned.",
            f"Tests look at up to {settings.tested} samples of the batch every "
            f"{settings.interval} steps. The average batch of the norm test with "
            f"η = {settings.eta:g} is {average}.",
            _leaders({arm: found for arm, found in arms.items() if arm != _constant(first)}),
        ],
        pictures=_draw(arms, settings, run),
    )


def _constant(batch: int) -> str:
    return f"constant {batch}"


def _norm(eta: float) -> str:
    return f"norm test, η = {eta:g}"


@dataclass(frozen=True)
class _Data:
    """Images as rows in [-1, 1], with labels."""

    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor
    classes: int

    def tuning(self) -> _Data:
        """The training images alone: the last fifth judges, the others are trained on."""
        kept = len(self.x) - len(self.x) // 5
        x, labels = self.x[:kept], self.labels[:kept]
        return _Data(x, labels, self.x[kept:], self.labels[kept:], self.classes)


def _images(settings: Settings) -> _Data:
    train, test = (
        load(settings.data, split=split, size=settings.size) for split in ("train", "test")
    )
    rows = [range(min(len(train), settings.train)), range(len(test))]
    (x, test_x), (labels, test_labels) = (
        [part.batch(here).flatten(1) for part, here in zip((train, test), rows)],
        [part.condition(here)["label"] for part, here in zip((train, test), rows)],
    )
    return _Data(x, labels, test_x, test_labels, len(train.classes))


def _loss(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(net(x), labels)


def _train(
    batch: int, rule: BatchTest | None, rate: float, settings: Settings, data: _Data, seed: int
) -> Trained:
    """One training; weights and the order of samples depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(data.x.shape[1], settings.width),
            nn.ReLU(),
            nn.Linear(settings.width, data.classes),
        )
    optimizer = AdAdaGrad(net.parameters(), rate)
    controller = BatchSizeController(
        rule if rule is not None else NormTest(),
        batch,
        b_max=max(batch, settings.b_max),
        interval=settings.interval,
    )
    order = ResizableBatches(len(data.x), batch, seed=seed)
    stream, sizes = iter(order), [(0, batch)]
    begun = time.perf_counter()
    while controller.samples < settings.budget:
        here = torch.tensor(next(stream))
        rows = [data.x[here], data.labels[here]]
        optimizer.zero_grad()
        _loss(net, *rows).backward()
        if rule is not None and controller.due:
            few = [values[: settings.tested] for values in rows]
            inner = isinstance(rule, InnerProductTest)
            controller.test(partial(per_sample_statistics, net, _loss, few, inner=inner))
        optimizer.step()
        controller.advance()
        if controller.batch_size != order.batch_size:
            order.batch_size = controller.batch_size
            sizes.append((controller.samples, controller.batch_size))
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        right = net(data.test_x).argmax(1) == data.test_labels
    spent = sum(record.seconds for record in controller.records)
    return Trained(float(right.float().mean()), controller.step, tuple(sizes), spent / seconds)


def _gaps(one: Sequence[Trained], other: Sequence[Trained]) -> list[float]:
    """Differences of accuracy, seed by seed."""
    return [a.accuracy - b.accuracy for a, b in zip(one, other)]


def _checks(arms: Mapping[str, Sequence[Trained]], settings: Settings) -> list[Check]:
    """The specification's rules, over all seeds together."""
    chosen = arms[_norm(settings.eta)]
    (small,) = arms[_constant(settings.constant[0])]
    return [
        Check(
            f"η = {settings.eta:g}: accuracy above a constant batch of its average size, plus one "
            "standard error",
            (shifted_mean(_gaps(chosen, arms[AVERAGE]), 1),),
            at_least=0.0,
        ),
        Check(
            f"η = {settings.eta:g}: accuracy above the largest constant batch, less two standard "
            "errors",
            (shifted_mean(_gaps(chosen, arms[_constant(settings.b_max)]), -2),),
            at_least=1e-4,
        ),
        Check(
            f"η = {settings.eta:g}: steps / those of the constant batch {settings.constant[0]}",
            tuple(one.steps / small.steps for one in chosen),
            at_most=0.5,
        ),
    ]


def _leaders(arms: Mapping[str, Sequence[Trained]]) -> str:
    """Which constant batch does best, and which growing one."""
    means = {arm: statistics.fmean(one.accuracy for one in found) for arm, found in arms.items()}
    fixed = max((arm for arm in means if arm.startswith("constant")), key=means.__getitem__)
    grown = max((arm for arm in means if not arm.startswith("constant")), key=means.__getitem__)
    return (
        f"At equal samples the best constant batch reaches {cell(means[fixed])} ({fixed}), the "
        f"best growing one {cell(means[grown])} ({grown})."
    )


def _draw(arms: Mapping[str, Sequence[Trained]], settings: Settings, run: Run) -> dict[Path, str]:
    """Batches over samples, and accuracy over steps."""
    growing = {arm: found for arm, found in arms.items() if not arm.startswith("constant")}
    lines = {}
    for arm, found in growing.items():
        sizes = found[0].sizes
        ends = [*(samples for samples, _ in sizes[1:]), settings.budget]
        # A step is drawn as two points: it begins where the last one ended.
        lines[arm] = (
            [x for (samples, _), end in zip(sizes, ends) for x in (samples, end)],
            [float(size) for _, size in sizes for _ in range(2)],
        )
    batches = curves(
        lines,
        run.path("batches.png"),
        across="samples seen",
        up="batch",
        logarithmic="y",
    )
    points = bands(
        {
            arm: (
                [statistics.fmean(one.steps for one in found)],
                [[one.accuracy] for one in found],
            )
            for arm, found in arms.items()
        },
        run.path("accuracy.png"),
        across="steps for the same samples",
        up="test accuracy",
        logarithmic="x",
    )
    steps = {arm: statistics.fmean(one.steps for one in found) for arm, found in arms.items()}
    return {
        batches: f"Growing batches, seed {settings.seeds[0]}: from {settings.b_min} to at most "
        f"{settings.b_max}.",
        points: "Accuracy against steps, mean and range of the seeds: "
        + ", ".join(f"{arm} {cell(value)} steps" for arm, value in steps.items())
        + ".",
    }
