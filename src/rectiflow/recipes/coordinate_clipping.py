"""Directional sharpness of optimizers, and clipping the few coordinates that cause it.

A transformer of 70,000 weights learns Python's standard library character by character. Along one
real training, what other optimizers would do at the same weights is measured: how sharply the loss
is curved along their directions, and how far one best step would bring it down. Then each trains by
itself, at the best of four learning rates. The paper does this with pretrained translation and code
models.

Source: arXiv 2306.00204, sections 3 to 5.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rectiflow.recipes.character_lab import (
    ADAM,
    ADAM_CLIPPED,
    LAST,
    SGD,
    SGD_CLIPPED,
    Look,
    NetSettings,
    RaceSettings,
    Tuned,
    follow,
    lost,
    race,
    told,
)
from rectiflow.recipes.characters import standard_library
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import standard_errors
from rectiflow.training.figures import bands
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Along the direction of SGD the loss is curved more sharply than along those of adaptive "
    "methods, because of few large coordinates of the gradient; clipping those lowers the "
    "sharpness, and makes SGD faster."
)
GRIDS = {
    SGD: (0.5, 1.0, 2.0, 4.0),
    SGD_CLIPPED: (2.5, 5.0, 10.0, 20.0),
    ADAM: (1e-3, 3e-3, 1e-2, 3e-2),
    ADAM_CLIPPED: (1e-2, 3e-2, 1e-1, 3e-1),
}


@dataclass(frozen=True)
class Settings:
    """Sharpness along real trainings, and trainings of their own."""

    net: NetSettings = field(default_factory=NetSettings)
    """The network whose sharpness is measured."""
    real: Mapping[str, float] = field(default_factory=lambda: {ADAM: 2e-3, SGD: 0.3})
    """The real trainings with their learning rates."""
    looks: tuple[int, ...] = (20, 100, 300)
    """Steps at which all directions are compared."""
    held_out: int = 64
    """Held-out windows on which they are."""
    race: RaceSettings = field(default_factory=lambda: RaceSettings(GRIDS))
    """Trainings of each optimizer by itself."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and windows."""


TINY = NetSettings(width=8, depth=1, heads=2, length=8, batch_size=4)
LARGE = NetSettings(width=256, depth=6, heads=8, length=256, batch_size=32)
PRESETS = {
    "quick": Settings(
        net=TINY,
        looks=(2, 4),
        held_out=8,
        race=RaceSettings({name: grid[1:3] for name, grid in GRIDS.items()}, 20_000, TINY, 4),
        seeds=(0,),
    ),
    "default": Settings(),
    "paper": Settings(
        net=LARGE, looks=(100, 1000, 5000), race=RaceSettings(GRIDS, 5_000_000, LARGE, 5000)
    ),
}


def run(settings: Settings, run: Run) -> Result:
    """Both experiments, their checks and pictures."""
    text = standard_library(settings.race.characters)
    looks = {
        real: [
            follow(
                text,
                settings.net,
                real,
                rate,
                settings.looks,
                held_out=settings.held_out,
                seed=seed,
            )
            for seed in settings.seeds
        ]
        for real, rate in settings.real.items()
    }
    tuned = race(settings.race, settings.seeds)
    return Result(
        slug="coordinate-clipping",
        claim=CLAIM,
        numbers=_numbers(looks, tuned),
        checks=_checks(looks, tuned),
        seeds=settings.seeds,
        notes=_notes(settings, tuned),
        pictures=_draw(settings, looks, tuned, run),
    )


Looks = Mapping[str, Sequence[Mapping[int, Look]]]


def _numbers(looks: Looks, tuned: Mapping[str, Tuned]) -> list[Number]:
    found = []
    for real, seeds in looks.items():
        for step in seeds[0]:
            where = f"step {step} of {real}"
            for name in seeds[0][step].sharpness:
                for quantity, attribute in (
                    ("sharpness of the direction", "sharpness"),
                    ("fall of the loss by one best step", "decrease"),
                    ("cosine with the gradient", "cosine"),
                ):
                    values = tuple(getattr(seed[step], attribute)[name] for seed in seeds)
                    found.append(Number(f"{quantity}, {where}", name, values))
            energy = tuple(seed[step].energy for seed in seeds)
            found.append(Number(f"energy in a tenth of coordinates, {where}", "gradient", energy))
    return found + [
        Number("loss after training by itself, nats", name, arm.losses)
        for name, arm in tuned.items()
    ]


def _checks(looks: Looks, tuned: Mapping[str, Tuned]) -> list[Check]:
    """The specification's rules, at every look of every real training; a tie is no success."""
    every = [
        [one for real in looks.values() for one in real[place].values()]
        for place in range(len(next(iter(looks.values()))))
    ]

    def each(choose: Callable[[Any], float], measure: Callable[[Look], float]) -> tuple[float, ...]:
        found = [list(map(measure, seed)) for seed in every]
        return tuple(math.nan if any(map(math.isnan, one)) else choose(one) for one in found)

    return [
        Check(
            "sharpness of clipped SGD / SGD, largest over looks",
            each(max, lambda one: one.sharpness[SGD_CLIPPED] / abs(one.sharpness[SGD])),
            at_most=0.999,
        ),
        Check(
            "sharpness of Adam / SGD, largest over looks",
            each(max, lambda one: one.sharpness[ADAM] / abs(one.sharpness[SGD])),
            at_most=1 / 3,
            broken=1.0,
        ),
        Check(
            "fall by one best step, clipped SGD / SGD, least over looks",
            each(min, lambda one: one.decrease[SGD_CLIPPED] / max(one.decrease[SGD], 1e-12)),
            at_least=1.001,
        ),
        Check(
            "loss of SGD above that of clipped SGD, in standard errors",
            (standard_errors(tuned[SGD].losses, tuned[SGD_CLIPPED].losses),),
            at_least=2.0,
            broken=0.0,
        ),
    ]


def _notes(settings: Settings, tuned: Mapping[str, Tuned]) -> list[str]:
    fall = standard_errors(tuned[ADAM].losses, tuned[ADAM_CLIPPED].losses)
    if math.isfinite(fall) and fall > 2:
        adam = "Clipped Adam is better than Adam"
    elif math.isfinite(fall) and fall < -2:
        adam = "Clipped Adam is worse than Adam"
    else:
        adam = "Clipped Adam and Adam do not differ beyond noise"
    return [
        f"{settings.race.characters} characters of Python's standard library, which differs "
        "between versions of Python.",
        told(tuned),
        *lost(tuned),
        f"{adam} ({cell(fall)} standard errors).",
        "The direction of SGD is that of its momentum, a mean over about ten gradients.",
    ]


def _draw(
    settings: Settings, looks: Looks, tuned: Mapping[str, Tuned], run: Run
) -> dict[Path, str]:
    pictures = {}
    for real, seeds in looks.items():
        steps = list(seeds[0])
        names = seeds[0][steps[0]].sharpness
        drawn = bands(
            {
                name: (
                    steps,
                    [[abs(seed[step].sharpness[name]) for step in steps] for seed in seeds],
                )
                for name in names
            },
            run.path(f"sharpness-{real.lower()}.png"),
            across=f"step of a training by {real}",
            up="|curvature| along the direction",
            logarithmic="xy",
        )
        last = {
            name: statistics.fmean(seed[steps[-1]].sharpness[name] for seed in seeds)
            for name in names
        }
        pictures[drawn] = (
            f"Directional sharpness along a training by {real}; at step {steps[-1]} "
            f"{cell(last[SGD])} for SGD, {cell(last[SGD_CLIPPED])} clipped, {cell(last[ADAM])} for "
            "Adam. Band: range of the seeds."
        )
    finite = {name: arm for name, arm in tuned.items() if all(map(math.isfinite, arm.losses))}
    if finite:
        drawn = bands(
            {
                name: ([place], [[loss] for loss in arm.losses])
                for place, (name, arm) in enumerate(finite.items(), 1)
            },
            run.path("trainings.png"),
            across="optimizer",
            up=f"loss of the last {min(LAST, settings.race.steps)} steps, nats",
        )
        best = min(finite, key=lambda name: statistics.fmean(finite[name].losses))
        pictures[drawn] = (
            f"Loss after {settings.race.steps} steps at the best of the learning rates tried: "
            f"lowest with {best}. Bar: range of the seeds."
        )
    return pictures
