"""What the recipe of rectified diffusion finds for a seed, and its pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rectiflow.flows.metrics import FirstOrderGap
from rectiflow.recipes.first_order_theory import Theory
from rectiflow.training.figures import bands, compare_samples, compare_trajectories
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

RECTIFIED, CONVERTED, TURNED = ARMS = (
    "rectified diffusion",
    "conversion to straight lines",
    "conversion, sign of the output turned first",
)
BEFORE = "teacher, not rectified"
Errors = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """One seed. Errors are mean squared distances to the teacher's samples, in one and two steps.

    Attributes:
        before: errors of the teacher itself.
        along: errors by arm and number of fine-tuning steps.
        phased: error of the teacher and of the student in M steps, by number of phases M.
        consistency: errors after the second stage.
        gaps: the first-order gap of the teacher, and of the arms on its path.
        images: first samples by name.
    """

    before: Errors
    along: dict[str, dict[int, Errors]]
    phased: dict[int, Errors]
    consistency: Errors
    gaps: dict[str, FirstOrderGap]
    images: dict[str, Tensor]

    def converted(self, length: int) -> Errors:
        """Errors after a number of fine-tuning steps, each of the better of both conversions."""
        one, two = (
            min(self.along[arm][length][place] for arm in (CONVERTED, TURNED)) for place in (0, 1)
        )
        return one, two


def crossing(scores: Scores) -> float:
    """The number of training steps from which a conversion is better in one step; inf if never.

    Between two looks the logarithm of the quotient is taken as linear in that of the length.
    """
    own = scores.along[RECTIFIED]
    before: tuple[float, float] | None = None
    for length in own:
        lead = math.log(own[length][0] / scores.converted(length)[0])
        if lead >= 0:
            if before is None:
                return float(length)
            first, was = before
            share = -was / (lead - was)
            return math.exp(first + share * (math.log(length) - first))
        before = (math.log(length), lead)
    return math.inf


def draw(scores: Sequence[Scores], theory: Theory, run: Run, seed: int) -> dict[Path, str]:
    """Error over training, gap over time, samples of the first seed, and the exact example."""
    looks = list(scores[0].along[RECTIFIED])
    pictures: dict[Path, str] = {}
    for place, title in enumerate(("one", "two")):
        level = statistics.fmean(s.before[place] for s in scores)
        rows = {arm: [[s.along[arm][n][place] for n in looks] for s in scores] for arm in ARMS}
        drawn = bands(
            {arm: (looks, found) for arm, found in rows.items()},
            run.path(f"{title}-step.png"),
            across="training steps",
            up=f"paired MSE, {title} step{'s' * place}",
            floor=(BEFORE, level),
            logarithmic="xy",
        )
        own, kept, turned = (
            [cell(statistics.fmean(row[i] for row in rows[arm])) for i in (0, -1)] for arm in ARMS
        )
        pictures[drawn] = (
            f"Distance from the teacher's sample in {title} step{'s' * place}: rectified "
            f"{own[0]} after {looks[0]} training steps and {own[1]} after {looks[-1]}, "
            f"converted {kept[0]} and {kept[1]}, with the sign turned first {turned[0]} and "
            f"{turned[1]}. Band: range of the seeds."
        )
    gaps = {name: [s.gaps[name] for s in scores] for name in scores[0].gaps}
    drawn = bands(
        {name: (g[0].times, [x.per_time.tolist() for x in g]) for name, g in gaps.items()},
        run.path("gap.png"),
        across="time t (0 noise, 1 data)",
        up="first-order gap, per dimension",
        logarithmic="y",
    )
    means = {name: cell(statistics.fmean(x.total for x in g)) for name, g in gaps.items()}
    pictures[drawn] = (
        f"How much the noise estimate changes along trajectories: {means[BEFORE]} before, "
        f"{means[RECTIFIED]} after rectification. Band: range of the seeds."
    )
    sheet = compare_samples(scores[0].images, run.path("samples.png"))
    pictures[sheet] = f"The same noises in all panels, seed {seed}."
    drawn = compare_trajectories(
        theory.panels, run.path("exact.png"), title="Exactly rectified Gaussian, cosine path"
    )
    pictures[drawn] = (
        "The states of an exactly rectified flow leave their chord by "
        f"{100 * theory.curvature:.0f}% of its length on average; divided by alpha + sigma they "
        "move on straight lines, and one first-order step is exact."
    )
    return pictures
