"""What the recipe of 2-rectified flow++ measures, and its numbers, checks, notes and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rectiflow.distill.crossing import CrossingRisk
from rectiflow.distill.straightening import Profile, Straightening
from rectiflow.recipes.diffusion_start import ARMS as STARTS
from rectiflow.recipes.diffusion_start import Start
from rectiflow.recipes.recipe import Check, Number
from rectiflow.recipes.tools import numbers
from rectiflow.training.figures import bands
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

UNIFORM, SHAPED, HUBER, PERCEPTUAL, LOGIT = (
    "uniform, L2",
    "U-shaped, L2",
    "U-shaped, pseudo-Huber",
    "U-shaped, perceptual Huber",
    "logit-normal, L2",
)
GRIDS = ("equal steps", "fitted steps")


@dataclass(frozen=True)
class Scored:
    """One reflowed flow.

    Attributes:
        one: Fréchet distance in one step.
        two: the same in two.
        four: in four.
        again: in four steps of re-interpolation, which first differs from Euler's in three.
        pixels: the one-step distance of raw pixels.
        missed: mean squared error of one step on pairs it has not seen.
    """

    one: float
    two: float
    four: float
    again: float
    pixels: float
    missed: float


@dataclass(frozen=True)
class Seed:
    """All that was measured for one seed.

    Attributes:
        teacher: distance of the first flow in many steps.
        arms: the reflowed flows.
        report: loss, gap and straightness over time, before and after the uniform L2 round.
        crossing: what crossings of the pairs would need.
        grids: distance of few Euler steps of the first flow from many, by grid, over `budgets`.
        start: the experiment on a diffusion start.
    """

    teacher: float
    arms: Mapping[str, Scored]
    report: Straightening
    crossing: CrossingRisk
    grids: Mapping[str, Sequence[float]]
    start: Start


def all_numbers(
    measured: Sequence[Seed], budgets: Sequence[int], steps: int, name: str
) -> list[Number]:
    """Every measured quantity but the floor."""
    by_arm = {arm: [seed.arms[arm] for seed in measured] for arm in measured[0].arms}
    found = numbers(
        by_arm,
        {
            f"{name}, 1 step": lambda s: s.one,
            f"{name}, 2 steps": lambda s: s.two,
            f"{name}, 4 steps": lambda s: s.four,
            f"{name}, 4 steps, re-interpolated": lambda s: s.again,
            "fd_pixels, 1 step": lambda s: s.pixels,
            "squared error of 1 step on unseen pairs": lambda s: s.missed,
        },
    )
    found.append(
        Number(
            f"{name}, {steps} steps",
            "first flow",
            tuple(seed.teacher for seed in measured),
        )
    )
    found += numbers(
        {
            "first flow": [s.report.before for s in measured],
            UNIFORM: [s.report.after for s in measured],
        },
        {"loss at the ends / in the middle": _ends, "S a dimension": lambda p: p.straightness},
    )
    found += numbers(
        {arm: [seed.start.distance[arm][-1] for seed in measured] for arm in STARTS},
        {f"{name}, 1 step, reflow of a denoiser": float},
    )
    for index, budget in enumerate(budgets):
        found += numbers(
            {grid: [seed.grids[grid] for seed in measured] for grid in GRIDS},
            {f"first flow: distance of {budget} steps from many": partial(_at, index)},
        )
    return [
        *found,
        Number(
            "share of crossings whose noise could be drawn",
            "pairs",
            tuple(seed.crossing.risk for seed in measured),
        ),
    ]


def _at(index: int, values: Sequence[float]) -> float:
    return values[index]


def _ends(found: Profile) -> float:
    """The smaller of the losses at both ends of time over that in the middle."""
    bins = len(found.loss)
    middle = statistics.fmean(found.loss[(bins - 1) // 2 : bins // 2 + 1])
    return min(found.loss[0], found.loss[-1]) / middle


def checks(measured: Sequence[Seed], name: str) -> list[Check]:
    """The specification's rules; the first three are on means over seeds."""
    mean = {
        arm: statistics.fmean(seed.arms[arm].one for seed in measured) for arm in measured[0].arms
    }
    title = f"{name} in one step, mean over seeds"
    return [
        Check(
            f"{title}: uniform / U-shaped",
            (mean[UNIFORM] / mean[SHAPED],),
            at_least=1.05,
            broken=1.0,
        ),
        Check(f"{title}: logit-normal / uniform", (mean[LOGIT] / mean[UNIFORM],), at_least=1.0),
        Check(
            f"{title}: logit-normal / U-shaped",
            (mean[LOGIT] / mean[SHAPED],),
            at_least=2.0,
            broken=1.0,
        ),
        Check(
            "reflowed flow: loss at the ends / in the middle",
            tuple(_ends(seed.report.after) for seed in measured),
            at_least=2.0,
        ),
        Check(
            "first flow: loss at the ends / in the middle",
            tuple(_ends(seed.report.before) for seed in measured),
            at_most=2.0,
        ),
        Check(
            "steps until the diffusion start is as good as the random start ends, as a part",
            tuple(seed.start.share for seed in measured),
            at_most=0.95,
            broken=1.0,
        ),
    ]


def notes(measured: Sequence[Seed], budgets: Sequence[int], first: int) -> list[str]:
    """What a reader should know; `first` is the first seed."""
    pairs = [
        f"{budget}: "
        + " and ".join(
            cell(statistics.fmean(seed.grids[grid][index] for seed in measured)) for grid in GRIDS
        )
        for index, budget in enumerate(budgets)
    ]
    return [
        f"Straightening, seed {first}: {measured[0].report.sentence}",
        f"Crossings, seed {first}: {measured[0].crossing.sentence}",
        "Distance of few Euler steps of the first flow from many, with equal steps and with steps "
        f"fitted to its error: {'; '.join(pairs)}.",
        "The perceptual loss sees a classifier trained with another seed than the one that judges; "
        "both are trained on the same digits, so its arm is no part of any check.",
    ]


def draw(
    measured: Sequence[Seed], budgets: Sequence[int], name: str, floor: float, run: Run
) -> dict[Path, str]:
    """Loss over time, one-step distance by arm, starts and grids."""
    reports = {
        "first flow, independent pairs": [seed.report.before for seed in measured],
        "reflowed flow, its own pairs": [seed.report.after for seed in measured],
    }
    over_time = bands(
        {arm: (found[0].times, [p.loss for p in found]) for arm, found in reports.items()},
        run.path("loss.png"),
        across="time t (0 noise, 1 data)",
        up="squared error of the velocity, a dimension",
        logarithmic="y",
    )
    steps = measured[0].start.steps
    starts = bands(
        {arm: (steps, [seed.start.distance[arm] for seed in measured]) for arm in STARTS},
        run.path("start.png"),
        across="reflow training steps",
        up=f"{name}, one step",
        floor=("train vs. test", floor),
        logarithmic="y",
    )
    grids = bands(
        {grid: (budgets, [seed.grids[grid] for seed in measured]) for grid in GRIDS},
        run.path("grids.png"),
        across="Euler steps",
        up="distance from many steps / spread of samples",
        logarithmic="xy",
    )
    ends = [cell(statistics.fmean(_ends(p) for p in found)) for found in reports.values()]
    share = cell(statistics.fmean(seed.start.share for seed in measured))
    gain = statistics.fmean(
        seed.grids["equal steps"][i] / seed.grids["fitted steps"][i]
        for seed in measured
        for i in range(len(budgets))
    )
    return {
        over_time: "Where the loss is left: the ends stand "
        f"{ends[0]} times above the middle for the first flow and {ends[1]} times for the "
        "reflowed one. Band: range of the seeds.",
        starts: f"One-step {name} while reflowing a denoiser's pairs: from the denoiser itself the "
        f"random start's last value is reached in {share} of its steps. Band: range of the seeds.",
        grids: "Error of few Euler steps of the first flow with equal steps and with steps fitted "
        f"to its measured error: {cell(gain)} times smaller with fitted ones on average.",
    }
