"""Sophia: do clipped second-order steps halve the number of steps that AdamW takes?

A function of two weights of very different curvature, where its steps can be counted, and a small
transformer that learns Python's standard library character by character in place of GPT-2.
Independent re-tests at 125 M parameters found AdamW as good after equal tuning.

Source: arXiv 2305.14342, sections 2 and 3.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.optim import SophiaG, SophiaH, sampled_cross_entropy
from rectiflow.recipes.character_lab import NetSettings
from rectiflow.recipes.characters import Characters, standard_library
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import numbers
from rectiflow.training.figures import bands, curves
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Clipped steps over an estimate of curvature cross valleys of unequal curvature in a few "
    "steps, and train language models in half the steps of AdamW."
)
SOPHIA, ADAMW = "Sophia-G", "AdamW"
NEWTON = "Newton"
NEVER = 10_000
"""Steps after which a method is taken not to arrive."""


@dataclass(frozen=True)
class Settings:
    """Two weights and one transformer."""

    toy_rates: tuple[float, ...] = tuple(10 ** (k / 4) for k in range(-16, 3))
    """Rates tried for every method on the two weights."""
    toy_steps: int = 400
    """Most steps there."""
    characters: int = 600_000
    """Length of the text."""
    net: NetSettings = field(default_factory=lambda: NetSettings(width=64, length=64))
    """The transformer and its batches."""
    steps: int = 600
    """Steps of a training; the short ones take half."""
    held_out: int = 64
    """Held-out windows that judge."""
    looks: int = 12
    """How often they do in a training."""
    adam_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """AdamW's rates; Sophia tries 0.8 of each."""
    decays: tuple[float, ...] = (0.03, 0.1, 0.3)
    """AdamW's weight decays, each with each rate."""
    gammas: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Sophia's weights of curvature, each with each rate."""
    interval: int = 10
    """Steps between Sophia's refreshes."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds that choose among the nine of each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and windows."""


PRESETS = {
    "quick": Settings(
        toy_rates=(0.01, 0.1, 1.0),
        toy_steps=60,
        characters=20_000,
        net=NetSettings(width=8, depth=1, heads=2, length=8, batch_size=4),
        steps=8,
        held_out=8,
        looks=2,
        adam_rates=(2e-3,),
        decays=(0.1,),
        gammas=(0.05,),
        interval=2,
        tuning_seeds=(),
        seeds=(0, 1),
    ),
    "default": Settings(),
    "paper": Settings(
        characters=5_000_000,
        net=NetSettings(width=768, depth=12, heads=12, length=1024, batch_size=480),
        steps=100_000,
        adam_rates=(6e-4,),
        decays=(0.1,),
        gammas=(0.05,),
        tuning_seeds=(),
    ),
}


def two_valleys(place: Tensor) -> Tensor:
    """Sharp in the first weight, flat in the second; the minimum is 0 at (1, 4).

    Source: arXiv 2305.14342, section 2.
    """
    a, b = place[..., 0], place[..., 1]
    return 8 * (a - 1) ** 2 * (1.3 * a**2 + 2 * a + 1) + 0.5 * (b - 4) ** 2


def steps_taken(method: str, rate: float, settings: Settings) -> int:
    """Steps from (0.2, 0) until the function is below 0.01, or `NEVER`."""
    place = nn.Parameter(torch.tensor([0.2, 0.0], dtype=torch.float64))
    mover: torch.optim.Optimizer
    if method == SOPHIA:
        # Signs as probes give the exact diagonal, since the two weights do not meet.
        mover = SophiaH([place], rate, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0, interval=1)
    elif method == "Adam":
        mover = torch.optim.Adam([place], rate)
    else:
        mover = torch.optim.SGD([place], rate)
    for step in range(settings.toy_steps):
        if float(two_valleys(place.detach())) < 1e-2:
            return step
        if not bool(place.isfinite().all()):
            break
        if isinstance(mover, SophiaH):
            mover.refresh(lambda: two_valleys(place))
        mover.zero_grad()
        two_valleys(place).backward()
        grad = place.grad
        assert grad is not None
        if method == "SignGD":
            grad.sign_()
        elif method == NEWTON:
            grad /= torch.autograd.functional.hessian(two_valleys, place.detach()).diagonal()
        mover.step()
    return NEVER


@dataclass(frozen=True)
class Choice:
    """What is tuned: the learning rate, and weight decay or gamma."""

    rate: float
    other: float


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        looks: steps at which held-out windows were judged.
        losses: their mean loss in nats at each; infinite if it was not finite.
        win_rates: share of weights not clipped at each; empty for AdamW.
    """

    looks: tuple[int, ...]
    losses: tuple[float, ...]
    win_rates: tuple[float, ...]


def train(
    settings: Settings, text: Characters, arm: str, choice: Choice, *, steps: int, seed: int
) -> Trained:
    """One training: a tenth of warm-up, then a cosine down to a twentieth; norm clipped to 1."""
    net = settings.net.build(text, seed)
    mover: torch.optim.Optimizer
    if arm == SOPHIA:
        mover = SophiaG(
            net.parameters(), choice.rate, gamma=choice.other, interval=settings.interval
        )
    else:
        mover = torch.optim.AdamW(
            net.parameters(), choice.rate, betas=(0.9, 0.95), weight_decay=choice.other
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.Generator().manual_seed(seed + 1)
    length = settings.net.length
    # The same held-out windows for every seed and arm.
    held = text.windows(
        settings.held_out, length, held_out=True, generator=torch.Generator().manual_seed(7)
    )
    warmup = max(1, steps // 10)
    due = {round(steps * (k + 1) / settings.looks) for k in range(settings.looks)}
    looks, losses, wins = [], [], []
    for step in range(steps):
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        shape = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        for group in mover.param_groups:
            group["lr"] = choice.rate * min(1.0, (step + 1) / warmup) * shape
        windows = text.windows(settings.net.batch_size, length, generator=generator)
        if isinstance(mover, SophiaG) and mover.due:
            mover.refresh(partial(_sampled, net, windows, labels))
        mover.zero_grad()
        net.loss(windows).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        mover.step()
        if step + 1 in due:
            with torch.no_grad():
                value = float(net.loss(held))
            looks.append(step + 1)
            losses.append(value if math.isfinite(value) else math.inf)
            if isinstance(mover, SophiaG):
                wins.append(mover.win_rate())
    return Trained(tuple(looks), tuple(losses), tuple(wins))


def _sampled(net: nn.Module, windows: Tensor, labels: torch.Generator) -> tuple[Tensor, int]:
    return sampled_cross_entropy(net(windows[:, :-1]), generator=labels)


def run(settings: Settings, run: Run) -> Result:
    """Both experiments, their checks and pictures."""
    taken = {
        method: min(steps_taken(method, rate, settings) for rate in settings.toy_rates)
        for method in (SOPHIA, "Adam", "SignGD", "GD")
    }
    taken[NEWTON] = steps_taken(NEWTON, 1.0, settings)
    text = standard_library(settings.characters)
    grids = {
        ADAMW: [Choice(*c) for c in itertools.product(settings.adam_rates, settings.decays)],
        SOPHIA: [
            Choice(0.8 * rate, gamma)
            for rate, gamma in itertools.product(settings.adam_rates, settings.gammas)
        ],
    }
    count = sum(map(len, grids.values())) * len(settings.tuning_seeds)
    count += 2 * len(grids) * len(settings.seeds)
    chosen: dict[str, Choice] = {}
    arms: dict[str, list[Trained]] = {}
    with bar("transformers", count, unit="trainings") as progress:

        def trained(arm: str, choice: Choice, steps: int, seed: int) -> Trained:
            found = train(settings, text, arm, choice, steps=steps, seed=seed)
            progress.update(progress.done + 1)
            return found

        def tried(arm: str, choice: Choice) -> float:
            seeds = settings.tuning_seeds
            steps = settings.steps // 2
            return statistics.fmean(trained(arm, choice, steps, seed).losses[-1] for seed in seeds)

        for arm, grid in grids.items():
            chosen[arm] = min(grid, key=partial(tried, arm)) if settings.tuning_seeds else grid[0]
            for name, steps in ((arm, settings.steps), (_half(arm), settings.steps // 2)):
                arms[name] = [trained(arm, chosen[arm], steps, seed) for seed in settings.seeds]
    return Result(
        slug="sophia",
        claim=CLAIM,
        numbers=_numbers(taken, arms),
        checks=_checks(taken, arms),
        seeds=settings.seeds,
        notes=_notes(settings, grids, chosen),
        pictures=_draw(arms, run),
    )


def _half(arm: str) -> str:
    return f"{arm}, half the steps"


def _numbers(taken: Mapping[str, int], arms: Mapping[str, Sequence[Trained]]) -> list[Number]:
    wins = {SOPHIA: arms[SOPHIA], _half(SOPHIA): arms[_half(SOPHIA)]}
    return [
        *(
            Number("two weights: steps until 0.01, at the best rate", method, (float(steps),))
            for method, steps in taken.items()
        ),
        *numbers(arms, {"held-out loss at the end, nats": lambda one: one.losses[-1]}),
        *numbers(
            wins,
            {"share of weights not clipped, mean": lambda one: statistics.fmean(one.win_rates)},
        ),
    ]


def _checks(taken: Mapping[str, int], arms: Mapping[str, Sequence[Trained]]) -> list[Check]:
    """The specification's rules; it expects the second to fail."""
    last = {arm: [one.losses[-1] for one in found] for arm, found in arms.items()}

    def above(arm: str) -> tuple[float, ...]:
        # Beside a training that diverged nothing is good.
        pairs = zip(last[arm], last[ADAMW])
        return tuple(a - b if math.isfinite(b) else math.nan for a, b in pairs)

    return [
        Check(
            "two weights: steps of Sophia / Adam",
            (taken[SOPHIA] / taken["Adam"],),
            at_most=1 / 3,
        ),
        Check(
            "text: loss of Sophia in half the steps - AdamW, nats",
            above(_half(SOPHIA)),
            at_most=0.0,
        ),
        Check(
            "text: loss of Sophia - AdamW in the same steps, nats",
            above(SOPHIA),
            at_most=0.03,
        ),
    ]


def _notes(
    settings: Settings, grids: Mapping[str, Sequence[Any]], chosen: Mapping[str, Choice]
) -> list[str]:
    sophia, adam = chosen[SOPHIA], chosen[ADAMW]
    return [
        f"Tuned in half the steps on {len(settings.tuning_seeds)} other seeds among "
        f"{len(grids[SOPHIA])} settings each, by the held-out windows that judge: AdamW rate "
        f"{adam.rate:g}, weight decay {adam.other:g}; Sophia rate {sophia.rate:g}, gamma "
        f"{sophia.other:g}. Every length of training has a schedule of its own.",
        f"Sophia takes {1 + 1 / settings.interval:g} gradients a step. On the two weights Newton's "
        f"method goes to a stationary point that is no minimum; {NEVER} steps stand for never. "
        "From a first weight below 0 Sophia would end in the other valley.",
    ]


def _draw(arms: Mapping[str, Sequence[Trained]], run: Run) -> dict[Path, str]:
    """Held-out losses, and the shares that are not clipped."""
    lines = {
        arm: (found[0].looks, [list(one.losses) for one in found]) for arm, found in arms.items()
    }
    losses = bands(lines, run.path("losses.png"), across="steps", up="held-out loss, nats")
    wins = curves(
        {f"seed {seed}": (one.looks, one.win_rates) for seed, one in enumerate(arms[SOPHIA])},
        run.path("win-rates.png"),
        across="steps",
        up="share of weights not clipped",
    )
    ends = ", ".join(
        f"{arm} {cell(statistics.fmean(one.losses[-1] for one in found))}"
        for arm, found in arms.items()
    )
    return {
        losses: f"Held-out loss, mean and range of the seeds; at the end {ends}.",
        wins: "The paper asks for 0.1 to 0.5.",
    }
