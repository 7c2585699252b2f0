"""AdamP and SGDP: steps that do not lengthen weights whose length does not matter.

A scale-invariant function of one vector, where everything can be computed, and a small network with
batch normalisation on garments in place of the paper's ImageNet.

Source: arXiv 2006.08217, sections 2 to 4.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rectiflow.diagnose import invariance_report
from rectiflow.optim import SGDP, AdamP
from rectiflow.recipes.classifier_lab import (
    LabelledImages,
    Trained,
    best_rate,
    new_classifier,
    standardised,
    train_classifier,
)
from rectiflow.recipes.classifiers import pooled_cnn
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import numbers, ratios
from rectiflow.training.figures import bands, curves
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Momentum lengthens the weights in front of a normalisation and so shrinks the effective step; "
    "taking the radial part out of each step prevents it, finds these weights by itself, and costs "
    "no accuracy."
)
GD, SGD, PROJECTED, NESTEROV = "GD", "SGD", "SGDP", "SGDP, Nesterov"
ADAMW, ADAMP = "AdamW", "AdamP"
ARMS = (SGD, PROJECTED, ADAMW, ADAMP)


@dataclass(frozen=True)
class Settings:
    """One vector and one network."""

    dimensions: int = 20
    """Length of the vector."""
    toy_steps: int = 200
    """Steps on the function of it."""
    toy_rate: float = 0.05
    """Learning rate there."""
    data: str = "fashion-mnist"
    """Labelled images, by spec string; digits where they are not there."""
    size: int | None = 14
    """Side in pixels."""
    train: int = 6_000
    """Images trained on."""
    test: int = 2_000
    """Images judged on."""
    width: int = 16
    """Channels of the first convolution."""
    epochs: int = 4
    """Passes over the images."""
    batch_size: int = 64
    """Images of a step."""
    constant_rate: float = 0.1
    """The rate at which the growth of weights is compared."""
    sgd_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Rates tried for SGD and SGDP, falling along a cosine."""
    adam_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Rates tried for AdamW and AdamP."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose among them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of vectors, weights and batches."""


PRESETS = {
    "quick": Settings(
        toy_steps=50,
        train=320,
        test=128,
        width=4,
        epochs=1,
        sgd_rates=(0.1,),
        adam_rates=(3e-3,),
        tuning_seeds=(),
        seeds=(0,),
    ),
    "default": Settings(),
    "paper": Settings(
        data="hub:cifar10",
        size=None,
        train=50_000,
        test=10_000,
        width=64,
        epochs=100,
        batch_size=128,
    ),
}


@dataclass(frozen=True)
class Turned:
    """A vector after gradient steps on a function of its direction.

    Attributes:
        squares: its squared length before each step, and at the end.
        miss: largest relative error of `|w'|² = |w|² + rate² |q|²` over the steps.
    """

    squares: tuple[float, ...]
    miss: float


def turn(arm: str, settings: Settings, seed: int) -> Turned:
    """Minimise `-(w . a) / |w|` from a random unit vector."""
    generator = torch.Generator().manual_seed(seed)
    aim, start = (
        nn.functional.normalize(
            torch.randn(1, settings.dimensions, generator=generator, dtype=torch.float64)
        )
        for _ in range(2)
    )
    weight = nn.Parameter(start.clone())
    rate = settings.toy_rate
    mover: torch.optim.Optimizer
    if arm in (GD, SGD):
        mover = torch.optim.SGD([weight], rate, momentum=0.0 if arm == GD else 0.9)
    else:
        mover = SGDP([weight], rate, momentum=0.9, nesterov=arm == NESTEROV)
    squares, miss = [1.0], 0.0
    for _ in range(settings.toy_steps):
        mover.zero_grad()
        (-(weight * aim).sum() / weight.norm()).backward()
        before = weight.detach().clone()
        mover.step()
        after = weight.detach()
        expected = float(before.square().sum() + (after - before).square().sum())
        squares.append(float(after.square().sum()))
        miss = max(miss, abs(squares[-1] / expected - 1))
    return Turned(tuple(squares), miss)


@dataclass(frozen=True)
class Grown:
    """Weights of a network trained at a constant rate.

    Attributes:
        growth: length of each kernel at the end over that at the start.
        flagged: share of the steps in which each kernel passed for scale-invariant.
        head: the same of the linear head, whose scale matters.
    """

    growth: tuple[float, ...]
    flagged: tuple[float, ...]
    head: float


class Flags:
    """Counts the steps in which each weight passes for scale-invariant."""

    def __init__(self) -> None:
        self.steps = 0
        self.counts: dict[str, int] = {}

    def __call__(self, step: int, net: nn.Module) -> None:
        weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
        grads = {name: p.grad for name, p in weights.items() if p.grad is not None}
        self.steps += 1
        for name, found in invariance_report(weights, grads).items():
            self.counts[name] = self.counts.get(name, 0) + (found.kind != "none")

    def shares(self) -> dict[str, float]:
        """The share of the steps, by weight."""
        return {name: count / self.steps for name, count in self.counts.items()}


def run(settings: Settings, run: Run) -> Result:
    """Both experiments, their checks and pictures."""
    turned = {
        arm: [turn(arm, settings, seed) for seed in settings.seeds]
        for arm in (GD, SGD, PROJECTED, NESTEROV)
    }
    images = standardised(
        settings.data, train=settings.train, test=settings.test, size=settings.size
    )
    rates: dict[str, float] = {}
    tuned: dict[str, list[Trained]] = {}
    tries = sum(len(_grid(arm, settings)) for arm in ARMS) * len(settings.tuning_seeds)
    count = 2 * len(settings.seeds) + tries + len(ARMS) * len(settings.seeds)
    with bar("classifiers", count, unit="trainings") as progress:

        def trained(arm: str, rate: float, seed: int) -> Trained:
            found = _tuned(arm, rate, settings, images, seed)
            progress.update(progress.done + 1)
            return found

        def score(arm: str, rate: float, seed: int) -> float:
            progress.update(progress.done + 1)
            return _tuned(arm, rate, settings, images.tuning(), seed).accuracy

        grown: dict[str, list[Grown]] = {}
        for arm in (SGD, PROJECTED):
            grown[arm] = [_grow(arm, settings, images, seed) for seed in settings.seeds]
            progress.update(progress.done + len(settings.seeds))
        for arm in ARMS:
            rates[arm] = best_rate(
                _grid(arm, settings),
                settings.tuning_seeds,
                partial(score, arm),
            )
            tuned[arm] = [trained(arm, rates[arm], seed) for seed in settings.seeds]
    return Result(
        slug="adamp",
        claim=CLAIM,
        numbers=_numbers(turned, grown, tuned),
        checks=_checks(turned, grown, tuned),
        seeds=settings.seeds,
        notes=_notes(settings, images, rates),
        pictures=_draw(settings, turned, tuned, run),
    )


def _grid(arm: str, settings: Settings) -> tuple[float, ...]:
    return settings.sgd_rates if arm in (SGD, PROJECTED) else settings.adam_rates


def _optimizer(arm: str, net: nn.Module, rate: float) -> torch.optim.Optimizer:
    if arm == SGD:
        return torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    if arm == PROJECTED:
        return SGDP(net.parameters(), rate, momentum=0.9)
    if arm == ADAMW:
        return torch.optim.AdamW(net.parameters(), rate, weight_decay=0.0)
    return AdamP(net.parameters(), rate)


def _tuned(arm: str, rate: float, settings: Settings, images: LabelledImages, seed: int) -> Trained:
    net = new_classifier(pooled_cnn, images, settings.width, seed=seed)
    return train_classifier(
        net,
        images,
        _optimizer(arm, net, rate),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
    )


def _grow(arm: str, settings: Settings, images: LabelledImages, seed: int) -> Grown:
    """How the kernels grow at a constant rate, and which weights are flagged on the way."""
    net = new_classifier(pooled_cnn, images, settings.width, seed=seed)
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    before = {name: float(p.detach().norm()) for name, p in weights.items()}
    flags = Flags()
    train_classifier(
        net,
        images,
        _optimizer(arm, net, settings.constant_rate),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        cosine=False,
        watch=flags,
    )
    shares = flags.shares()
    kernels = [name for name, p in weights.items() if p.ndim == 4]
    (head,) = (name for name in weights if name not in kernels)
    growth = tuple(float(weights[name].detach().norm()) / before[name] for name in kernels)
    return Grown(growth, tuple(shares[name] for name in kernels), shares[head])


def _growth(turned: Sequence[Turned]) -> tuple[float, ...]:
    """How much the squared length has grown, by seed."""
    return tuple(one.squares[-1] - 1 for one in turned)


def _numbers(
    turned: Mapping[str, Sequence[Turned]],
    grown: Mapping[str, Sequence[Grown]],
    tuned: Mapping[str, Sequence[Trained]],
) -> list[Number]:
    return [
        *(Number("vector: growth of |w|²", arm, _growth(found)) for arm, found in turned.items()),
        *numbers(
            grown,
            {
                "network: growth of the first kernel": lambda one: one.growth[0],
                "network: growth of the second kernel": lambda one: one.growth[1],
                "network: least share of steps with a kernel flagged": lambda one: min(one.flagged),
                "network: share of steps with the head flagged": lambda one: one.head,
            },
        ),
        *numbers(tuned, {"network: test accuracy, per cent": lambda one: one.accuracy}),
    ]


def _checks(
    turned: Mapping[str, Sequence[Turned]],
    grown: Mapping[str, Sequence[Grown]],
    tuned: Mapping[str, Sequence[Trained]],
) -> list[Check]:
    """The specification's rules."""
    both = list(zip(grown[PROJECTED], grown[SGD]))
    accuracy = {arm: [one.accuracy for one in found] for arm, found in tuned.items()}
    return [
        Check(
            "vector: |w'|² = |w|² + rate² |q|² under SGDP, relative error",
            tuple(one.miss for arm in (PROJECTED, NESTEROV) for one in turned[arm]),
            at_most=1e-6,
        ),
        Check(
            "vector: growth of |w|², SGD / SGDP (19 for steps of equal length)",
            ratios(_growth(turned[SGD]), _growth(turned[PROJECTED])),
            at_least=10.0,
        ),
        Check(
            "network: growth of the kernels, SGDP / SGD, the largest of kernels and seeds",
            # One value, since any seed can refute it. The tensor's maximum keeps a NaN.
            (float(torch.tensor([ratios(a.growth, b.growth) for a, b in both]).max()),),
            at_most=0.7,
        ),
        Check(
            "network: share of steps in which a kernel is flagged, the least",
            tuple(min(a.flagged) for a, _ in both),
            at_least=0.95,
        ),
        Check(
            "network: share of steps in which the head is flagged",
            tuple(max(a.head, b.head) for a, b in both),
            at_most=0.0,
        ),
        *(
            Check(
                f"network: mean accuracy, {new} - {old}, per cent",
                (statistics.fmean(accuracy[new]) - statistics.fmean(accuracy[old]),),
                at_least=-1.0,
            )
            for new, old in ((PROJECTED, SGD), (ADAMP, ADAMW))
        ),
    ]


def _notes(settings: Settings, images: LabelledImages, rates: Mapping[str, float]) -> list[str]:
    return [
        f"{len(images.inputs):,} images of {images.name}, {settings.epochs} epochs. Growth is "
        f"compared at the constant rate {settings.constant_rate:g}, accuracy at rates that fall "
        f"along a cosine from the best of {len(settings.sgd_rates)}, tried on "
        f"{len(settings.tuning_seeds)} other seeds and a fifth of the training images: "
        + ", ".join(f"{arm} {rates[arm]:g}" for arm in ARMS)
        + ".",
        "A gain in accuracy is not claimed at this scale; no arm decays its weights.",
    ]


def _draw(
    settings: Settings,
    turned: Mapping[str, Sequence[Turned]],
    tuned: Mapping[str, Sequence[Trained]],
    run: Run,
) -> dict[Path, str]:
    """Lengths of the vector, and training losses."""
    steps = range(len(turned[GD][0].squares))
    lengths = curves(
        {arm: (steps, found[0].squares) for arm, found in turned.items()},
        run.path("lengths.png"),
        across="steps",
        up="|w|²",
    )
    ends = ", ".join(f"{arm} {cell(found[0].squares[-1])}" for arm, found in turned.items())
    epochs = range(1, tuned[SGD][0].epochs + 1)
    losses = bands(
        {arm: (epochs, [one.means() for one in found]) for arm, found in tuned.items()},
        run.path("losses.png"),
        across="epoch",
        up="training loss",
    )
    means = ", ".join(
        f"{arm} {cell(statistics.fmean(one.accuracy for one in found))}"
        for arm, found in tuned.items()
    )
    return {
        lengths: "Squared length of a vector whose length does not matter, seed "
        f"{settings.seeds[0]}; in the end {ends}.",
        losses: f"Training loss, mean and range of the seeds; test accuracy in per cent: {means}.",
    }
