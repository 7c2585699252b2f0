"""TrAct: a first layer trained through its outputs, on small classifiers and a linear regression.

The same initial weights, the same batches and the learning rate that suits the plain layer best;
only the gradient of the first layer differs. The paper's setting is CIFAR-10 with ResNet-18 and
vision transformers; ours has 10,000 garments, three convolutions and two attention blocks. In the
linear regression on inputs up to 255 nothing is random, so it shows what the rule itself does.

Source: arXiv 2410.23970, section 4.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rectiflow.optim import apply_tract
from rectiflow.recipes.classifier_lab import (
    LabelledImages,
    Trained,
    best_rate,
    new_classifier,
    standardised,
    train_classifier,
)
from rectiflow.recipes.classifiers import PatchTransformer, strided_cnn
from rectiflow.recipes.pixel_regression import SAME_RATE, TRACT_RATE, Regression, regress
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import numbers, shifted_mean
from rectiflow.training.figures import bands, curves
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Moving a first layer's weights as if its outputs were trained gives better accuracy after the "
    "same number of epochs, at the learning rate tuned for plain training, and lets inputs of any "
    "scale be learned from."
)
PLAIN = "plain"
CNN, VIT = "CNN, SGD", "ViT, Adam"
JUDGED = 0.1
"""The damping by which the claim is judged."""


@dataclass(frozen=True)
class Settings:
    """One experiment."""

    data: str = "fashion-mnist"
    """Labelled images, by spec string; digits where they are not there."""
    size: int | None = None
    """Side in pixels; None keeps that of the data."""
    train: int = 10_000
    """Images trained on, from the first."""
    test: int = 4_000
    """Images judged on, from the first."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 128
    """Images of a batch."""
    lams: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Dampings of the CNN; the claim is judged at 0.1, which the transformer has alone."""
    cnn_width: int = 16
    """Channels of the first convolution."""
    cnn_rates: tuple[float, ...] = (0.03, 0.1)
    """Learning rates tried for the plain CNN."""
    vit_width: int = 64
    """Width of the transformer."""
    vit_depth: int = 2
    """Its blocks."""
    vit_heads: int = 4
    """Its heads."""
    vit_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates tried for the plain transformer."""
    smoothing: float = 0.0
    """Label smoothing of the transformer's training."""
    vit_seeds: int = 3
    """How many of the seeds the transformer has: no check judges it."""
    pixels: int = 20
    """Inputs of the linear regression."""
    rows: int = 500
    """Its samples."""
    regression_steps: int = 60
    """Its steps."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Seeds that choose the learning rates."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of weights and batches."""

    def __post_init__(self) -> None:
        if JUDGED not in self.lams:
            raise ValueError(f"lams must hold {JUDGED:g}, where the claim is judged: {self.lams}")


PRESETS = {
    "quick": Settings(
        train=640,
        test=200,
        epochs=1,
        lams=(0.1,),
        cnn_rates=(0.1,),
        vit_rates=(3e-3,),
        vit_width=32,
        vit_depth=1,
        tuning_seeds=(),
        seeds=(0,),
    ),
    "default": Settings(),
    # The paper's rates and epochs; its ResNet-18 is a wider CNN here.
    "paper": Settings(
        data="hub:cifar10",
        train=50_000,
        test=10_000,
        epochs=100,
        cnn_width=64,
        cnn_rates=(0.08,),
        vit_width=384,
        vit_depth=7,
        vit_heads=12,
        vit_rates=(1e-3,),
        smoothing=0.1,
        tuning_seeds=(),
    ),
}


def run(settings: Settings, run: Run) -> Result:
    """The experiments, their checks and pictures."""
    images = standardised(
        settings.data, train=settings.train, test=settings.test, size=settings.size
    )
    rates, arms = {}, {}
    grids = {CNN: settings.cnn_rates, VIT: settings.vit_rates}
    plans: dict[str, tuple[Sequence[float], Sequence[int]]] = {
        CNN: (settings.lams, settings.seeds),
        VIT: ((JUDGED,), settings.seeds[: settings.vit_seeds]),
    }
    tried = sum(len(grid) for grid in grids.values() if len(grid) > 1) * len(settings.tuning_seeds)
    count = tried + sum((1 + len(lams)) * len(seeds) for lams, seeds in plans.values())
    with bar("classifiers", count, unit="trainings") as progress:

        def trained(kind: str, lam: float | None, rate: float, seed: int) -> Trained:
            found = _train(kind, lam, rate, settings, images, seed)
            progress.update(progress.done + 1)
            return found

        def score(kind: str, rate: float, seed: int) -> float:
            progress.update(progress.done + 1)
            return _train(kind, None, rate, settings, images.tuning(), seed).accuracy

        for kind, grid in grids.items():
            rates[kind] = best_rate(grid, settings.tuning_seeds, partial(score, kind))
            lams, seeds = plans[kind]
            dampings = {PLAIN: None, **{_name(lam): lam for lam in lams}}
            arms[kind] = {
                name: [trained(kind, lam, rates[kind], seed) for seed in seeds]
                for name, lam in dampings.items()
            }
    regression = regress(settings.pixels, settings.rows, settings.regression_steps)
    return Result(
        slug="tract",
        claim=CLAIM,
        numbers=[*_numbers(arms), *_regression_numbers(regression)],
        checks=_checks(arms[CNN], regression),
        seeds=settings.seeds,
        notes=_notes(settings, images, rates, arms),
        pictures=_draw(arms, regression, run),
    )


def _name(lam: float) -> str:
    return f"TrAct, λ = {lam:g}"


def _train(
    kind: str,
    lam: float | None,
    rate: float,
    settings: Settings,
    images: LabelledImages,
    seed: int,
) -> Trained:
    """One training; weights and batches depend on the seed alone."""
    optimizer: torch.optim.Optimizer
    if kind == CNN:
        net = new_classifier(strided_cnn, images, settings.cnn_width, seed=seed)
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    else:
        sizes = (settings.vit_width, settings.vit_depth, settings.vit_heads)
        net = new_classifier(PatchTransformer, images, *sizes, seed=seed)
        optimizer = torch.optim.Adam(net.parameters(), rate)
    if lam is not None:
        apply_tract(net, lam, example=(images.inputs[:2],))
    return train_classifier(
        net,
        images,
        optimizer,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        smoothing=settings.smoothing if kind == VIT else 0.0,
    )


def _gains(arms: Mapping[str, Sequence[Trained]], name: str) -> list[float]:
    """Accuracy above the plain layer's, seed by seed."""
    return [one.accuracy - plain.accuracy for one, plain in zip(arms[name], arms[PLAIN])]


def _numbers(arms: Mapping[str, Mapping[str, Sequence[Trained]]]) -> list[Number]:
    shown = []
    for kind, by_arm in arms.items():
        shown += numbers(
            by_arm,
            {
                f"{kind}: test accuracy, per cent": lambda one: one.accuracy,
                f"{kind}: training loss at the end of the first epoch": _early,
            },
        )
        shown += [
            Number(f"{kind}: accuracy gained, same seed", arm, tuple(_gains(by_arm, arm)))
            for arm in by_arm
            if arm != PLAIN
        ]
    return shown


def _early(one: Trained) -> float:
    """The mean loss of the last quarter of the first epoch."""
    return one.means(4 * one.epochs)[3]


def _regression_numbers(found: Regression) -> list[Number]:
    quantity = "linear regression on pixels: condition number"
    return [
        Number(quantity, "plain", (found.plain,)),
        Number(quantity, "TrAct, measured", (found.rectified,)),
        Number(quantity, "TrAct, s / (s + λ)", (found.expected,)),
        *(
            Number("linear regression on pixels: last excess loss / first", arm, (curve[-1],))
            for arm, curve in found.losses.items()
        ),
    ]


def _checks(arms: Mapping[str, Sequence[Trained]], found: Regression) -> list[Check]:
    """The specification's rules; what it asks of a mean over seeds is one value."""
    return [
        Check(
            f"{CNN}: accuracy gained at λ = {JUDGED:g}, mean less two standard errors",
            (shifted_mean(_gains(arms, _name(JUDGED)), -2),),
            at_least=1e-3,
        ),
        Check(
            "regression: TrAct's last excess loss / first, at rate 1",
            (found.losses[TRACT_RATE][-1],),
            at_most=1e-6,
        ),
        Check(
            "regression: plain SGD's last excess loss / first, at the same rate",
            (found.losses[SAME_RATE][-1],),
            at_least=1.0,
        ),
        Check(
            "regression: measured condition number / that of s / (s + λ)",
            (found.rectified / found.expected,),
            at_most=1.001,
        ),
    ]


def _notes(
    settings: Settings,
    images: LabelledImages,
    rates: Mapping[str, float],
    arms: Mapping[str, Mapping[str, Sequence[Trained]]],
) -> list[str]:
    texts = [
        f"{len(images.inputs):,} training and {len(images.test_inputs):,} test images of "
        f"{images.name}, {settings.epochs} epochs.",
        "Learning rates: "
        + "; ".join(
            f"{kind} {rates[kind]:g} of {len(grid)} tried for the plain layer"
            for kind, grid in ((CNN, settings.cnn_rates), (VIT, settings.vit_rates))
        )
        + f", on {len(settings.tuning_seeds)} other seeds and a fifth of the training images. "
        "TrAct takes the same, untuned, at every λ.",
    ]
    if images.name != settings.data:
        texts.append(f"{settings.data} was not found: digits stand in for it.")
    gain = _gains(arms[VIT], _name(JUDGED))
    texts.append(
        f"The transformer under Adam, which no check judges, gains "
        f"{cell(statistics.fmean(gain))} at λ = {JUDGED:g} ({cell(shifted_mean(gain, -2))} less "
        f"two standard errors of {len(gain)} seeds)."
    )
    return texts


def _draw(
    arms: Mapping[str, Mapping[str, Sequence[Trained]]], found: Regression, run: Run
) -> dict[Path, str]:
    """Training losses of both networks, and the regression's."""
    drawn: dict[Path, str] = {}
    for kind, file in ((CNN, "cnn.png"), (VIT, "vit.png")):
        lines: dict[str, tuple[list[float], list[list[float]]]] = {}
        for arm, trained in arms[kind].items():
            rows = [one.means(16) for one in trained]
            steps = [(i + 0.5) * len(trained[0].losses) / len(rows[0]) for i in range(len(rows[0]))]
            lines[arm] = (steps, rows)
        path = bands(lines, run.path(file), across="training steps", up="training loss")
        means = {
            arm: cell(statistics.fmean(one.accuracy for one in trained))
            for arm, trained in arms[kind].items()
        }
        drawn[path] = (
            f"{kind}: training loss, mean and range of the seeds. Test accuracy: "
            + ", ".join(f"{arm} {value}" for arm, value in means.items())
            + "."
        )
    path = curves(
        {name: (range(len(curve)), curve) for name, curve in found.losses.items()},
        run.path("regression.png"),
        across="steps",
        up="loss above the least / the first",
        logarithmic="y",
    )
    drawn[path] = (
        f"Linear regression on pixels up to 255: the condition number is {cell(found.plain)} for "
        f"the plain layer and {cell(found.rectified)} under TrAct; at the rate that TrAct takes, "
        f"plain gradient descent ends at {cell(found.losses[SAME_RATE][-1])} of its first loss."
    )
    return drawn
