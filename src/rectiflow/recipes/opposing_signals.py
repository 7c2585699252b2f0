"""Opposing signals: pairs of small groups that make training sharp, and what happens without them.

The paper's own toy in closed form, then full-batch gradient descent on 1,000 images of
Fashion-MNIST with a network of three layers, past the edge of stability. The paper finds its groups
by eye, in a ResNet on CIFAR-10; here they are found by the change of each loss, with controls, and
taken out of the training to see whether they are the cause.

Source: arXiv 2311.04163, sections 2 and 3.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.diagnose import OpposingSignals, SampleProbe, Watch
from rectiflow.diagnose.groups import extremes
from rectiflow.recipes.opposing_interventions import (
    RANDOM,
    UNCHANGED,
    WITHOUT,
    descend,
    intervene,
)
from rectiflow.recipes.opposing_toy import ARMS, ToyFound, ToySettings, run_toy
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import numbers
from rectiflow.training.data import load
from rectiflow.training.figures import bands, curves
from rectiflow.training.progress import bar
from rectiflow.training.report import cell
from rectiflow.training.runs import Run

CLAIM = (
    "Past the edge of stability small groups of samples swing against each other: their gradients "
    "are opposite and along the sharpest direction, unlike those of random groups; the toy model "
    "of it spikes after it has converged."
)
EDGE = 2.0


@dataclass(frozen=True)
class Settings:
    """The toy, the training on images and the interventions."""

    data: str = "fashion-mnist"
    """Images, by spec string."""
    samples: int = 1000
    """The first so many training images."""
    pool: int = 2
    """Averaged pixels, each way."""
    hidden: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers."""
    rate: float = 0.15
    """Learning rate of full-batch descent."""
    steps: int = 1500
    """Its steps."""
    size: int = 20
    """Samples a group."""
    every: int = 25
    """Steps between reports; steps after which the loss rose have one in any case."""
    rises: int = 60
    """The first so many rises past the edge are judged."""
    after: int = 100
    """Steps of each intervention, from the last regular report before the first rise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and controls."""
    toy: ToySettings = field(default_factory=ToySettings)
    """The experiment on the toy."""


PRESETS = {
    "quick": Settings(
        data="digits",
        samples=60,
        pool=1,
        hidden=(8,),
        rate=1.5,
        steps=60,
        size=5,
        every=10,
        rises=5,
        after=10,
        seeds=(0,),
        toy=ToySettings(flow_steps=200),
    ),
    "default": Settings(),
    "paper": Settings(samples=5000, steps=5000, size=25, seeds=(0, 1, 2, 3, 4)),
}


@dataclass(frozen=True)
class Found:
    """What one seed showed.

    Attributes:
        rises: reports of the judged rises past the edge.
        early: reports before the edge, by their cosine.
        rows: all reports.
        swaps: at the judged rises, the part of G+ that was G- one step before.
        spikes: by intervention the largest rise of the loss of samples that all arms train on.
        product: learning rate times sharpness over the run.
    """

    rises: list[dict[str, Any]]
    early: list[float]
    rows: list[dict[str, Any]]
    swaps: list[float]
    spikes: dict[str, float]

    def median(self, key: str) -> float:
        """The median of a measure over the judged rises; NaN if there were none."""
        values = [row[key] for row in self.rises]
        return statistics.median(values) if values else float("nan")

    @property
    def opposite(self) -> float:
        """Share of the judged rises at which the groups project to opposite sides."""
        signs = [row["proj_plus"] * row["proj_minus"] < 0 for row in self.rises]
        return sum(signs) / len(signs) if signs else float("nan")


def run(settings: Settings, run: Run) -> Result:
    """The toy, then the training of every seed with its interventions."""
    toy = run_toy(settings.toy)
    images, labels = load_images(settings)
    found, pictures = [], {}
    for seed in settings.seeds:
        folder = run.path(f"seed-{seed}")
        one, drawn = train_and_intervene(settings, images, labels, seed, folder)
        found.append(one)
        if seed == settings.seeds[0]:
            pictures = drawn
    return Result(
        slug="opposing-signals",
        claim=CLAIM,
        numbers=_numbers(toy, found),
        checks=_checks(toy, found, settings),
        seeds=settings.seeds,
        notes=_notes(found, settings),
        pictures={**_draw(toy, found, run), **pictures},
    )


def load_images(settings: Settings) -> tuple[Tensor, Tensor]:
    """The images, made smaller, and their labels."""
    data = load(settings.data, split="train")
    rows = torch.arange(min(settings.samples, len(data)))
    images = functional.avg_pool2d(data.batch(rows), settings.pool)
    return images, data.condition(rows)["label"]


def make_net(inputs: int, classes: int, settings: Settings, seed: int) -> nn.Sequential:
    """Linear layers with tanh in between; smooth, so that curvature is all there is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [inputs, *settings.hidden, classes]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train_and_intervene(
    settings: Settings, images: Tensor, labels: Tensor, seed: int, folder: Path
) -> tuple[Found, dict[Path, str]]:
    """Descent with its reports, then the interventions before its first rise; and pictures."""
    inputs = images.flatten(1)
    inputs = (inputs - inputs.mean()) / inputs.std()
    classes = int(labels.max()) + 1
    net = make_net(inputs.shape[1], classes, settings, seed)
    probe = SampleProbe(net, inputs, labels, images=images)
    look = OpposingSignals(probe, every=settings.every, on_rise=True, size=settings.size, seed=seed)
    watch = Watch([look], folder)
    kept: dict[int, dict[str, Tensor]] = {}
    with bar(f"descent, seed {seed}", settings.steps) as progress:
        for step in range(1, settings.steps + 1):
            if step % settings.every == 1 or settings.every == 1:
                kept[step - 1] = copy.deepcopy(net.state_dict())
            descend(net, lambda: probe.losses(torch.arange(len(probe))).mean(), settings.rate)
            watch.observe(step, learning_rate=settings.rate)
            progress.update(step)
    rows = watch.rows[look.name]
    judged = [row for row in rows if row["change"] > 0 and row["eta_lambda"] > EDGE]
    judged = judged[: settings.rises]
    first = min((row["step"] for row in rows if row["change"] > 0), default=settings.steps)
    found = Found(
        rises=judged,
        early=[row["cos_pm"] for row in rows if row["step"] < first and row["eta_lambda"] < EDGE],
        rows=rows,
        swaps=[swapped(look, row["step"], settings.size) for row in judged],
        spikes={},
    )
    if judged:
        begin = max(step for step in kept if step < judged[0]["step"])
        groups = torch.tensor([*judged[0]["idx_plus"], *judged[0]["idx_minus"]])
        found.spikes.update(
            intervene(
                probe, kept[begin], groups, rate=settings.rate, steps=settings.after, seed=seed
            )
        )
    return found, watch.draw()


def swapped(look: OpposingSignals, step: int, size: int) -> float:
    """The part of a step's G+ that was G- one step before: 1 where the groups change sides."""
    place = look.steps.index(step)
    if place < 2:
        return 0.0
    before, middle, after = look.losses[place - 2 : place + 1]
    rose = set(extremes(after - middle, size).plus.tolist())
    fell = set(extremes(middle - before, size).minus.tolist())
    return len(rose & fell) / size


def _numbers(toy: ToyFound, found: Sequence[Found]) -> list[Number]:
    seeds = [one for one in found if one.rises]
    listed = [
        Number("toy: largest loss after it was below 1e-4", arm, (toy.spike[arm],)) for arm in ARMS
    ]
    listed += [
        Number("toy: last rate x sharpness / 2", ARMS[0], (toy.settled,)),
        Number("toy: squared correlation of coefficient and sharpness", "flow", (toy.linear,)),
        *(
            Number("toy: last sharpness of the flow", f"coefficient {target:g}", (value,))
            for target, value in toy.final.items()
        ),
        Number(
            "rises past the edge that are judged", "descent", tuple(len(f.rises) for f in found)
        ),
    ]
    if not seeds:
        return listed
    cosines = {
        "groups": "cos_pm",
        "random groups": "cos_rand",
        "random groups with the groups' labels": "cos_labels",
        "other samples with the groups' losses": "cos_matched",
    }
    title = "cosine of the two groups' gradients at rises, median"
    for arm, key in cosines.items():
        listed.append(Number(title, arm, tuple(one.median(key) for one in seeds)))
    listed += numbers(
        {"groups": seeds},
        {
            "rate x sharpness at rises, median": lambda f: f.median("eta_lambda"),
            "rises with projections to opposite sides": lambda f: f.opposite,
            "length of gradients against random groups": lambda f: f.median("norm_ratio"),
            "share of all changes of losses": lambda f: f.median("share"),
            "part of G+ that was G- one step before": lambda f: statistics.median(f.swaps),
        },
    )
    listed += numbers(
        {"before the edge": [one for one in seeds if one.early]},
        {"cosine of the two groups' gradients, median": lambda f: statistics.median(f.early)},
    )
    for arm in seeds[0].spikes:
        rises = tuple(one.spikes[arm] for one in seeds)
        listed.append(Number("largest rise of the loss after intervening", arm, rises))
    return [number for number in listed if number.values]


def _checks(toy: ToyFound, found: Sequence[Found], settings: Settings) -> list[Check]:
    """The specification's rules; without a single rise past the edge nothing can pass."""

    def each(measure: Callable[[Found], float]) -> tuple[float, ...]:
        return tuple(measure(one) for one in found)

    def early(one: Found) -> float:
        return statistics.median(one.early) if one.early else float("nan")

    def against_unchanged(arm: str) -> tuple[float, ...]:
        return tuple(
            one.spikes[arm] / one.spikes[UNCHANGED] if one.spikes.get(UNCHANGED) else float("nan")
            for one in found
        )

    return [
        Check("toy: largest loss after convergence", (toy.spike[ARMS[0]],), at_least=1e-2),
        Check("toy: the same without a feature", (toy.spike[ARMS[1]],), at_most=1e-4),
        Check("toy: the same with one layer", (toy.spike[ARMS[2]],), at_most=1e-4),
        Check("toy: last rate x sharpness / 2", (toy.settled,), at_most=1.0),
        Check(
            "toy: squared correlation of coefficient and sharpness", (toy.linear,), at_least=0.999
        ),
        Check(
            "cosine of the groups at rises past the edge, median",
            each(lambda f: f.median("cos_pm")),
            at_most=-0.6,
        ),
        Check("the same of random groups", each(lambda f: f.median("cos_rand")), at_least=0.0),
        Check("rises with opposite projections", each(lambda f: f.opposite), at_least=0.9),
        Check("cosine of the groups before the edge, median", each(early), at_least=-0.3),
        Check(
            "rise of the loss without the groups, against unchanged",
            against_unchanged(WITHOUT),
            at_most=0.5,
            broken=0.8,
        ),
        Check(
            "rise of the loss without random samples, against unchanged",
            against_unchanged(RANDOM),
            at_least=0.5,
        ),
    ]


def _notes(found: Sequence[Found], settings: Settings) -> list[str]:
    rows = sum(len(one.rows) for one in found)
    notes = [
        f"{rows} reports on {settings.samples} images of {settings.data}; groups of "
        f"{settings.size}; the first {settings.rises} rises of the loss with rate x sharpness "
        "above 2 are judged.",
        "Interventions are judged on samples that all arms train on, so that leaving out samples "
        "does not count as lowering their loss.",
    ]
    if not all(one.rises for one in found):
        notes.append("Some seeds did not get past the edge: nothing can be said about these.")
    elif found[0].rises:
        worst = max(found[0].rises, key=lambda row: row["change"])
        counts = worst["label_counts"]
        notes.append(
            f"Seed {settings.seeds[0]}, step {worst['step']}: labels of G+ {counts['plus']}, of G- "
            f"{counts['minus']}."
        )
    return notes


def _draw(toy: ToyFound, found: Sequence[Found], run: Run) -> dict[Path, str]:
    """The toy's losses and sharpness, and the interventions."""
    drawn = curves(
        {arm: (range(len(losses)), losses) for arm, losses in toy.losses.items()},
        run.path("toy-losses.png"),
        across="step of gradient descent",
        up="loss",
        logarithmic="y",
    )
    spike = cell(toy.spike[ARMS[0]])
    pictures = {
        drawn: f"The toy converges, then spikes to {spike}; without a feature and with one layer "
        "it does not."
    }
    descent = toy.sharpness["gradient descent"]
    drawn = curves(
        {"gradient descent": (range(len(descent)), descent)},
        run.path("toy-sharpness.png"),
        across="step of gradient descent",
        up="sharpness",
        floor=("edge of stability", descent[-1] / toy.settled),
    )
    pictures[drawn] = (
        f"Sharpness of the toy: it rises with what is learned, to {cell(max(descent))}, past the "
        f"edge, and is {cell(descent[-1])} after the spike."
    )
    seeds = [one for one in found if one.spikes]
    if seeds:
        drawn = bands(
            {
                arm: ([place], [[one.spikes[arm]] for one in seeds])
                for place, arm in enumerate(seeds[0].spikes, 1)
            },
            run.path("interventions.png"),
            across="intervention",
            up="largest rise of the loss",
        )
        pictures[drawn] = (
            "How far the loss of the other samples rises after each intervention just before the "
            "first spike. Bar: range of the seeds."
        )
    return pictures
