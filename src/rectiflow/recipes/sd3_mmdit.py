"""Stable Diffusion 3: better training times, the shift between resolutions, and the MMDiT.

Five small experiments on digits and a mixture of Gaussians in place of ImageNet and text: time
samplers by mean rank, the error along the path, the shift between resolutions, class labels
through joint attention, and QK norm in bfloat16.

Source: arXiv 2403.03206, tables 1 and 2, equation 23, figures 2, 5 and 6.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from rectiflow.files import cache_folder
from rectiflow.recipes.joint_attention import (
    ConditionSettings,
    Judge,
    Logits,
    LogitSettings,
    accuracy,
    logits_after_training,
)
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.resolution_curves import (
    Curves,
    CurveSettings,
    curves_at_every_size,
    distance,
)
from rectiflow.recipes.time_samplers import (
    BEST,
    UNIFORM,
    AblationSettings,
    ErrorSettings,
    compare_samplers,
    errors_over_time,
    mean_ranks,
    middle_over_ends,
)
from rectiflow.recipes.tools import stage
from rectiflow.training.data import load
from rectiflow.training.evaluation import Evaluator
from rectiflow.training.figures import bands, curves, save_images
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.report import cell
from rectiflow.training.runs import Run
from rectiflow.training.trainer import TrainerSettings

CLAIM = (
    "Rectified flows train better on logit-normal times than on uniform ones; larger images need "
    "times shifted toward noise by the ratio of their sides; text and image streams that attend "
    "jointly follow their condition, and normalised queries and keys keep attention bounded in "
    "half precision."
)
TIMES = tuple(i / 20 for i in range(21))
WITH, WITHOUT = "MMDiT", "MMDiT without labels"
NORM, PLAIN = "RMS norm", "no norm"


@dataclass(frozen=True)
class Settings:
    """The five experiments."""

    data: str = "digits"
    """Labelled images, by spec string."""
    size: int | None = None
    """Side in pixels; None keeps that of the data."""
    features: str = "auto"
    """Features of the distance: auto, or inception:PATH for FID."""
    samples: int = 2000
    """Samples for each distance."""
    ablation: AblationSettings = field(default_factory=AblationSettings)
    """Time samplers."""
    errors: ErrorSettings = field(default_factory=ErrorSettings)
    """Error along the path."""
    shift: CurveSettings = field(default_factory=CurveSettings)
    """Resolutions."""
    condition: ConditionSettings = field(default_factory=ConditionSettings)
    """Labels."""
    logits: LogitSettings = field(default_factory=LogitSettings)
    """QK norm."""


def _short(steps: int) -> TrainerSettings:
    return stage(steps, batch_size=32)


def _paper(steps: int, batch_size: int) -> TrainerSettings:
    optim = OptimizerSettings(name="adamw", learning_rate=1e-4, warmup=1000)
    return TrainerSettings(
        steps=steps, batch_size=batch_size, ema=0.9999, optim=optim, precision="bf16"
    )


_LARGE = {"depth": 24, "head_dim": 64, "qk_norm": "rms", "patch": 8}

PRESETS = {
    "quick": Settings(
        samples=200,
        ablation=AblationSettings(
            net_options={"width": 32, "depth": 1, "time_features": 16},
            training=_short(30),
            steps=(2, 5),
            seeds=(0,),
        ),
        errors=ErrorSettings(width=16, training=_short(30), count=200, seeds=(0,)),
        shift=CurveSettings(
            factors=(2,),
            net_options={"width": 32, "depth": 1},
            training=_short(30),
            times=(0.2, 0.5, 0.8),
            seeds=(0,),
        ),
        condition=ConditionSettings(
            net_options={"depth": 1, "heads": 2, "head_dim": 8},
            training=_short(20),
            steps=2,
            samples=40,
            seeds=(0,),
        ),
        logits=LogitSettings(
            net_options={"depth": 1, "heads": 2, "head_dim": 8},
            training=replace(_short(10), precision="bf16", ema=0.0),
            seeds=(0,),
        ),
    ),
    "default": Settings(),
    # Pixels in patches of 8 stand in for the paper's latents in patches of 2.
    "paper": Settings(
        data="hub:ILSVRC/imagenet-1k",
        size=256,
        samples=50_000,
        ablation=AblationSettings(
            net="mmdit", net_options=_LARGE, training=_paper(500_000, 1024), seeds=(0,)
        ),
        shift=CurveSettings(
            factors=(2,), net="mmdit", net_options=_LARGE, training=_paper(100_000, 256), seeds=(0,)
        ),
        condition=ConditionSettings(
            net_options=_LARGE, training=_paper(500_000, 1024), steps=50, seeds=(0,)
        ),
        logits=LogitSettings(net_options=_LARGE, training=_paper(2000, 256), seeds=(0,)),
    ),
}


@dataclass(frozen=True)
class Found:
    """Everything measured.

    Attributes:
        distances: Fréchet distance by sampler, seed and number of steps.
        errors: squared error over `TIMES`, one list a seed.
        curves: denoising errors by enlargement, one table a seed.
        obeyed: accuracy by arm, one value a seed.
        logits: by arm, one record a seed.
        sheet: samples of the conditional network, classes in turn.
    """

    distances: dict[str, list[dict[int, float]]]
    errors: list[list[float]]
    curves: list[dict[int, Curves]]
    obeyed: dict[str, list[float]]
    logits: dict[str, list[Logits]]
    sheet: Tensor


def run(settings: Settings, run: Run) -> Result:
    """All experiments, their checks and pictures."""
    train, test = (load(settings.data, split=s, size=settings.size) for s in ("train", "test"))
    evaluator = Evaluator(
        train, test, count=settings.samples, features=settings.features, cache=cache_folder()
    )
    judge = Judge(train)
    obeyed: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    sheets = []
    for seed in settings.condition.seeds:
        for arm in obeyed:
            share, made = accuracy(settings.condition, train, judge, seed, blind=arm == WITHOUT)
            obeyed[arm].append(share)
            sheets.append(made)
    found = Found(
        distances=compare_samplers(settings.ablation, train, evaluator),
        errors=[errors_over_time(settings.errors, TIMES, s) for s in settings.errors.seeds],
        curves=[curves_at_every_size(settings.shift, train, s) for s in settings.shift.seeds],
        obeyed=obeyed,
        logits={
            arm: [
                logits_after_training(settings.logits, train, seed, qk_norm=norm)
                for seed in settings.logits.seeds
            ]
            for arm, norm in ((NORM, "rms"), (PLAIN, None))
        },
        sheet=sheets[0][:60],
    )
    rows = list(range(len(test)))
    known = judge.accuracy(test.batch(rows), test.condition(rows)["label"])
    return Result(
        slug="sd3-mmdit",
        claim=CLAIM,
        numbers=_numbers(found, evaluator.name, evaluator.floor().fd),
        checks=_checks(found),
        seeds=settings.ablation.seeds,
        notes=[
            f"The classifier that judges labels knows {100 * known:.1f}% of the held-out images.",
            "Ranks are over all seeds and numbers of steps; differences between samplers are "
            "small at this size, so single distances say little.",
            f"Seeds of the error along the path {settings.errors.seeds}, of the resolutions "
            f"{settings.shift.seeds}, of the labels {settings.condition.seeds}, of the logits "
            f"{settings.logits.seeds}.",
        ],
        pictures=_draw(found, settings, run),
    )


def _falls(found: Found) -> dict[int, tuple[float, ...]]:
    """By enlargement: the distance to the original curve without the shift over that with it."""
    return {
        factor: tuple(
            distance(by[factor].same, by[1].same) / distance(by[factor].shifted, by[1].same)
            for by in found.curves
        )
        for factor in found.curves[0]
        if factor != 1
    }


def _gained(found: Found) -> tuple[float, ...]:
    return tuple(100 * (a - b) for a, b in zip(found.obeyed[WITH], found.obeyed[WITHOUT]))


def _numbers(found: Found, distance_name: str, floor: float) -> list[Number]:
    ranks = mean_ranks(found.distances)
    numbers = [Number("mean rank", name, (rank,)) for name, rank in ranks.items()]
    for steps in found.distances[UNIFORM][0]:
        numbers += [
            Number(f"{distance_name}, {steps} steps", name, tuple(by[steps] for by in seeds))
            for name, seeds in found.distances.items()
        ]
    numbers.append(Number(distance_name, "floor: train vs. test", (floor,)))
    for factor in _falls(found):
        for arm in ("same", "shifted"):
            away = tuple(distance(getattr(by[factor], arm), by[1].same) for by in found.curves)
            numbers.append(Number(f"distance of curves, sides x {factor}", f"{arm} times", away))
    numbers += [
        Number("accuracy of samples (%)", arm, tuple(100 * share for share in shares))
        for arm, shares in found.obeyed.items()
    ]
    numbers += [
        Number("largest attention logit", arm, tuple(one.largest for one in seeds))
        for arm, seeds in found.logits.items()
    ]
    return numbers


def _checks(found: Found) -> list[Check]:
    """The claim as bounds; the first two are the specification's mean-rank rule."""
    ranks = mean_ranks(found.distances)
    middle = tuple(middle_over_ends(TIMES, errors) for errors in found.errors)
    within = tuple(one.largest / one.bound for one in found.logits[NORM])
    grown = tuple(
        plain.largest / norm.largest for plain, norm in zip(found.logits[PLAIN], found.logits[NORM])
    )
    return [
        # Behind uniform times but not last: weak.
        Check(
            f"mean rank, {UNIFORM} - {BEST}",
            (ranks[UNIFORM] - ranks[BEST],),
            at_least=0,
            broken=-float(len(ranks)),
        ),
        Check(
            f"samplers that rank behind {BEST}",
            (float(sum(rank > ranks[BEST] for rank in ranks.values())),),
            at_least=1,
        ),
        Check("error at the middle / at the ends of the path", middle, at_least=1.5, broken=1),
        *(
            Check(
                f"distance of curves, sides x {n}, without / with shift", f, at_least=3, broken=1.5
            )
            for n, f in _falls(found).items()
        ),
        Check("accuracy of samples (%)", tuple(100 * s for s in found.obeyed[WITH]), at_least=85),
        Check("accuracy gained by joint attention (points)", _gained(found), at_least=40),
        # Rounding to bfloat16 is worth two parts in a hundred at most.
        Check("largest logit with norm / its bound", within, at_most=1.02),
        Check("largest logit without norm / with norm", grown, at_least=4, broken=1),
    ]


def _draw(found: Found, settings: Settings, run: Run) -> dict[Path, str]:
    ranks = mean_ranks(found.distances)
    steps = list(found.distances[UNIFORM][0])
    pictures = {}
    drawn = bands(
        {
            name: (steps, [list(by.values()) for by in seeds])
            for name, seeds in found.distances.items()
        },
        run.path("samplers.png"),
        across="Euler steps",
        up="Fréchet distance",
        logarithmic="xy",
    )
    pictures[drawn] = (
        f"Distance by time sampler: mean rank {cell(ranks[BEST])} for {BEST}, "
        f"{cell(ranks[UNIFORM])} for uniform times. Band: range of the seeds."
    )
    drawn = bands(
        {"trained": (TIMES, found.errors)},
        run.path("errors.png"),
        across="time t (0 noise, 1 data)",
        up="E |v - exact v|²",
        logarithmic="y",
    )
    ratio = statistics.fmean(middle_over_ends(TIMES, errors) for errors in found.errors)
    pictures[drawn] = (
        f"Error of a velocity trained on uniform times, mixture of Gaussians: {cell(ratio)} times "
        "as large in the middle as at the worse end. Band: range of the seeds."
    )
    first = found.curves[0]
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for factor, by in first.items():
        if factor == 1:
            lines["original size"] = (settings.shift.times, by.same)
        else:
            lines[f"sides x {factor}"] = (settings.shift.times, by.same)
            lines[f"sides x {factor}, shifted"] = (settings.shift.times, by.shifted)
    drawn = curves(
        lines,
        run.path("resolutions.png"),
        across="time t at the original size",
        up="error of the estimated data, per pixel",
        logarithmic="xy",
    )
    falls = ", ".join(f"{cell(statistics.fmean(f))} (x {n})" for n, f in _falls(found).items())
    pictures[drawn] = (
        f"Denoising at several sizes, seed {settings.shift.seeds[0]}: the shift brings the curves "
        f"closer by the factors {falls}."
    )
    shown = save_images(found.sheet, run.path("labelled.png"), columns=10)
    shares = [100 * statistics.fmean(found.obeyed[arm]) for arm in (WITH, WITHOUT)]
    pictures[shown] = (
        f"Samples for the labels in turn, accuracy {shares[0]:.1f}% (trained without labels: "
        f"{shares[1]:.1f}%)."
    )
    return pictures
