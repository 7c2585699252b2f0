"""diffGrad: is friction on unchanged gradients more than a smaller step?

The friction is one half where a gradient stays as it is, so Adam at half the rate is the control
that the paper does not have. Three functions of one variable from the paper, and a small
convolutional network on garments in place of its ResNet-50 on CIFAR.

Source: arXiv 1909.11015, sections 4 and 5.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rectiflow.optim import DiffGrad
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
from rectiflow.recipes.tools import numbers, standard_errors
from rectiflow.training.figures import bands, curves
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Slowing down the weights whose gradient has stopped changing lets Adam stop in the better "
    "minimum and classify images more accurately, beyond what a smaller step gives."
)
ADAM, HALF, DIFFGRAD, SIGNED = "Adam", "Adam, half the rate", "diffGrad", "diffGrad v1"
ARMS = (ADAM, HALF, DIFFGRAD, SIGNED)


@dataclass(frozen=True)
class Settings:
    """Three functions and one network."""

    toy_steps: int = 299
    """Steps on the functions, from x = -1."""
    toy_rate: float = 0.1
    """Learning rate there."""
    data: str = "fashion-mnist"
    """Labelled images, by spec string; digits where they are not there."""
    train: int = 10_000
    """Images trained on."""
    test: int = 2_000
    """Images judged on."""
    width: int = 16
    """Channels of the first convolution."""
    epochs: int = 5
    """Passes over the images."""
    batch_size: int = 64
    """Images of a step."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates tried for every arm; the control takes half of each."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose among them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""


PRESETS = {
    "quick": Settings(
        toy_steps=100,
        train=512,
        test=256,
        width=4,
        epochs=1,
        rates=(1e-3,),
        tuning_seeds=(),
        seeds=(0, 1),
    ),
    "default": Settings(),
    "paper": Settings(
        data="hub:cifar10", train=50_000, test=10_000, width=64, epochs=100, tuning_seeds=(100, 101)
    ),
}


def first_function(x: Tensor) -> Tensor:
    """A minimum of 0 at -0.3 and one of 0.05 at 0.2.

    Source: arXiv 1909.11015, section 4, as its notebook's gradients integrate.
    """
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def second_function(x: Tensor) -> Tensor:
    """A steep wall, then waves: the best minimum is near -0.643, another one near 0.

    Source: as `first_function`; the notebook's own derivative of the waves is wrong.
    """
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


def third_function(x: Tensor) -> Tensor:
    """Even: parabola, ridge, and a kink down to 0.

    Source: as `first_function`.
    """
    away = x.abs()
    return torch.where(away > 0.5, x**2, torch.where(away > 0.4, 0.75 - away, 7 * away / 8))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F1": first_function,
    "F2": second_function,
    "F3": third_function,
}


def optimizer(
    arm: str, weights: list[nn.Parameter], rate: float, *, first_decay: float = 0.9
) -> torch.optim.Optimizer:
    """An arm of the comparison, at the rate that Adam takes."""
    betas = (first_decay, 0.999)
    if arm in (ADAM, HALF):
        return torch.optim.Adam(weights, rate / 2 if arm == HALF else rate, betas=betas)
    return DiffGrad(weights, rate, betas=betas, version="v0" if arm == DIFFGRAD else "v1")


def descend(function: Callable[[Tensor], Tensor], arm: str, settings: Settings) -> list[float]:
    """Places on the way down a function, from -1."""
    x = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
    mover = optimizer(arm, [x], settings.toy_rate, first_decay=0.95)
    places = [float(x.detach())]
    for _ in range(settings.toy_steps):
        mover.zero_grad()
        function(x).sum().backward()
        mover.step()
        places.append(float(x.detach()))
    return places


class MeanFriction:
    """The mean friction of each epoch, seen from the gradients alone.

    Args:
        per_epoch: steps of an epoch.
    """

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch = per_epoch
        self.epochs: list[float] = []
        self._before: list[Tensor] = []
        self._total = torch.zeros(())

    def __call__(self, step: int, net: nn.Module) -> None:
        now = [p.grad.detach().clone() for p in net.parameters() if p.grad is not None]
        before = self._before or [torch.zeros_like(g) for g in now]
        sums = [torch.sigmoid((a - b).abs()).sum() for a, b in zip(before, now)]
        self._total += torch.stack(sums).sum() / sum(g.numel() for g in now)
        self._before = now
        if (step + 1) % self.per_epoch == 0:
            self.epochs.append(float(self._total) / self.per_epoch)
            self._total = torch.zeros(())


def run(settings: Settings, run: Run) -> Result:
    """Both experiments, their checks and pictures."""
    toys = {
        name: {arm: descend(function, arm, settings) for arm in ARMS}
        for name, function in FUNCTIONS.items()
    }
    images = standardised(settings.data, train=settings.train, test=settings.test)
    friction = MeanFriction(len(images.inputs) // settings.batch_size)
    rates, arms = {}, {}
    count = len(ARMS) * (len(settings.rates) * len(settings.tuning_seeds) + len(settings.seeds))
    with bar("classifiers", count, unit="trainings") as progress:

        def trained(arm: str, rate: float, seed: int) -> Trained:
            found = _train(arm, rate, settings, images, seed, friction)
            progress.update(progress.done + 1)
            return found

        def score(arm: str, rate: float, seed: int) -> float:
            progress.update(progress.done + 1)
            return _train(arm, rate, settings, images.tuning(), seed).accuracy

        for arm in ARMS:
            rates[arm] = best_rate(
                settings.rates,
                settings.tuning_seeds,
                partial(score, arm),
            )
            arms[arm] = [trained(arm, rates[arm], seed) for seed in settings.seeds]
    measures = {
        "test accuracy, per cent": lambda one: one.accuracy,
        "training loss of the last epoch": lambda one: one.means()[-1],
    }
    toy_numbers = [
        Number(f"{name} where it ends", arm, (_value(name, path[-1]),))
        for name, paths in toys.items()
        for arm, path in paths.items()
    ]
    return Result(
        slug="diffgrad",
        claim=CLAIM,
        numbers=[*toy_numbers, *numbers(arms, measures)],
        checks=_checks(toys, arms),
        seeds=settings.seeds,
        notes=_notes(settings, images, rates, toys, friction),
        pictures=_draw(toys, arms, run),
    )


def _train(
    arm: str,
    rate: float,
    settings: Settings,
    images: LabelledImages,
    seed: int,
    friction: MeanFriction | None = None,
) -> Trained:
    """One training; the friction is looked at in the first of the reported ones."""
    net = new_classifier(pooled_cnn, images, settings.width, seed=seed)
    looked = arm == DIFFGRAD and seed == settings.seeds[0]
    return train_classifier(
        net,
        images,
        optimizer(arm, list(net.parameters()), rate),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        watch=friction if looked else None,
    )


def _value(name: str, place: float) -> float:
    return float(FUNCTIONS[name](torch.tensor(place, dtype=torch.float64)))


def _checks(
    toys: Mapping[str, Mapping[str, Sequence[float]]], arms: Mapping[str, Sequence[Trained]]
) -> list[Check]:
    """The specification's rules; half the rate is the control."""
    ends = {
        name: {arm: _value(name, path[-1]) for arm, path in paths.items()}
        for name, paths in toys.items()
    }
    accuracy = {arm: [one.accuracy for one in found] for arm, found in arms.items()}
    return [
        Check(
            "F1 and F2: diffGrad ends lower than Adam by",
            tuple(ends[name][ADAM] - ends[name][DIFFGRAD] for name in ("F1", "F2")),
            at_least=0.01,
        ),
        Check(
            "F1 and F2: diffGrad ends lower than Adam at half the rate by",
            tuple(ends[name][HALF] - ends[name][DIFFGRAD] for name in ("F1", "F2")),
            at_least=0.01,
        ),
        *(
            Check(
                f"accuracy above {other}, in standard errors",
                (standard_errors(accuracy[DIFFGRAD], accuracy[other]),),
                at_least=2.0,
            )
            for other in (ADAM, HALF)
        ),
    ]


def _notes(
    settings: Settings,
    images: LabelledImages,
    rates: Mapping[str, float],
    toys: Mapping[str, Mapping[str, Sequence[float]]],
    friction: MeanFriction,
) -> list[str]:
    ends = "; ".join(
        f"{name} " + ", ".join(f"{arm} {path[-1]:.3f}" for arm, path in paths.items())
        for name, paths in toys.items()
    )
    return [
        f"{len(images.inputs):,} images of {images.name}, {settings.epochs} epochs. Learning rates "
        f"of {len(settings.rates)} tried for every arm on {len(settings.tuning_seeds)} other "
        "seeds and a fifth of the training images: "
        + ", ".join(f"{arm} {rates[arm]:g}" for arm in ARMS)
        + ".",
        f"Places where the descents end: {ends}.",
        "Mean friction by epoch, which one half means Adam at half the rate: "
        + ", ".join(f"{value:.4f}" for value in friction.epochs)
        + ". The first file that was released compares each gradient with itself where gradients "
        "are zeroed in place, and is Adam at half the rate from its second step on.",
    ]


def _draw(
    toys: Mapping[str, Mapping[str, Sequence[float]]],
    arms: Mapping[str, Sequence[Trained]],
    run: Run,
) -> dict[Path, str]:
    """Descents of the second function, and training losses."""
    steps = range(len(toys["F2"][ADAM]))
    path = curves(
        {arm: (steps, places) for arm, places in toys["F2"].items()},
        run.path("descents.png"),
        across="steps",
        up="x on F2",
        floor=("the best minimum", -0.643),
    )
    epochs = range(1, arms[ADAM][0].epochs + 1)
    losses = bands(
        {arm: (epochs, [one.means() for one in found]) for arm, found in arms.items()},
        run.path("losses.png"),
        across="epoch",
        up="training loss",
    )
    means = ", ".join(
        f"{arm} {cell(statistics.fmean(one.accuracy for one in found))}"
        for arm, found in arms.items()
    )
    ends = ", ".join(f"{arm} {cell(places[-1])}" for arm, places in toys["F2"].items())
    return {
        path: f"Descents from -1 on F2. They end at: {ends}.",
        losses: f"Training loss, mean and range of the seeds; test accuracy in per cent: {means}.",
    }
