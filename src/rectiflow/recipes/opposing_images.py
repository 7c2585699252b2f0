"""Descent on images past the edge of stability: its groups, and whether they cause it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.diagnose import OpposingSignals, SampleProbe, Watch
from rectiflow.training.data import load
from rectiflow.training.progress import bar

if TYPE_CHECKING:
    from jaxtyping import Int

EDGE = 2.0
UNCHANGED, WITHOUT, RANDOM, CLIPPED, SLOWER = (
    "unchanged",
    "without the groups",
    "without random samples",
    "gradient of the groups clipped",
    "half the learning rate",
)


@dataclass(frozen=True)
class ImageSettings:
    """A training on images and the interventions."""

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
    """Steps between reports; until enough rises were seen, each step after which the loss rose has
    one too."""
    rises: int = 60
    """The first so many rises past the edge are judged."""
    after: int = 100
    """Steps of each intervention, from the last regular report before the first rise."""


@dataclass(frozen=True)
class Found:
    """What one seed showed.

    Attributes:
        rises: reports of the judged rises past the edge.
        early: reports before the edge, by their cosine.
        rows: all reports.
        look: what made them, with the losses of all samples.
        spikes: by intervention the largest rise of the loss of samples that all arms train on.
    """

    rises: list[dict[str, Any]]
    early: list[float]
    rows: list[dict[str, Any]]
    look: OpposingSignals
    spikes: dict[str, float]

    def median(self, key: str) -> float:
        """The median of a measure over the judged rises; NaN if there were none."""
        values = [row[key] for row in self.rises if row[key] is not None]
        return statistics.median(values) if values else float("nan")

    @property
    def opposite(self) -> float:
        """Share of the judged rises at which the groups project to opposite sides."""
        signs = [row["proj_plus"] * row["proj_minus"] < 0 for row in self.rises]
        return sum(signs) / len(signs) if signs else float("nan")


def load_images(settings: ImageSettings) -> tuple[Tensor, Tensor]:
    """The images, made smaller, and their labels."""
    data = load(settings.data, split="train")
    rows = torch.arange(min(settings.samples, len(data)))
    images = functional.avg_pool2d(data.batch(rows), settings.pool)
    return images, data.condition(rows)["label"]


def make_net(inputs: int, classes: int, settings: ImageSettings, seed: int) -> nn.Sequential:
    """Linear layers with tanh in between; smooth, so that curvature is all there is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [inputs, *settings.hidden, classes]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train_and_intervene(
    settings: ImageSettings, images: Tensor, labels: Tensor, seed: int, folder: Path
) -> Found:
    """Descent with its reports, then the interventions before its first rise."""
    inputs = images.flatten(1)
    inputs = (inputs - inputs.mean()) / inputs.std()
    classes = int(labels.max()) + 1
    net = make_net(inputs.shape[1], classes, settings, seed)
    probe = SampleProbe(net, inputs, labels, images=images)
    look = OpposingSignals(probe, every=settings.every, on_rise=True, size=settings.size, seed=seed)
    watch = Watch([look], folder)
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.rate)
    kept: dict[int, dict[str, Tensor]] = {}
    with bar(f"descent, seed {seed}", settings.steps) as progress:
        for step in range(1, settings.steps + 1):
            if step % settings.every == 1 or settings.every == 1:
                kept[step - 1] = copy.deepcopy(net.state_dict())
            descend(optimizer, probe.losses(torch.arange(len(probe))).mean())
            watch.observe(step, optimizer)
            progress.update(step)
            rows = watch.rows[look.name]
            judged = [row for row in rows if row["change"] > 0 and row["eta_lambda"] > EDGE]
            # Once there are enough, regular reports show what becomes of it.
            look.on_rise = len(judged) < settings.rises
    judged = judged[: settings.rises]
    first = min((row["step"] for row in rows if row["change"] > 0), default=settings.steps)
    found = Found(
        rises=judged,
        early=[row["cos_pm"] for row in rows if row["step"] < first and row["eta_lambda"] < EDGE],
        rows=rows,
        look=look,
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
    return found


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def intervene(
    probe: SampleProbe,
    state: Mapping[str, Tensor],
    groups: Int[Tensor, " m"],
    *,
    rate: float,
    steps: int,
    seed: int = 0,
) -> dict[str, float]:
    """The largest rise of the loss over some steps of full-batch descent, by intervention.

    The loss that is judged is that of samples which are in the training of every arm, so that
    leaving out samples does not count as lowering their loss. The clipped arm scales the groups'
    part of the gradient down to the length that a random group of that size has.

    Args:
        probe: the model with all its samples; the model is left with the last arm's weights.
        state: its weights before the spike.
        groups: the samples of both groups.
        rate: learning rate.
        steps: steps of each arm.
        seed: of the random samples.
    """
    net, count = probe.model, len(probe)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    outside = order[~torch.isin(order, groups)]
    random, rest = outside[: len(groups)], outside[len(groups) :]
    everyone = torch.arange(count)
    others = everyone[~torch.isin(everyone, groups)]

    def over(indices: Tensor) -> Callable[[], Tensor]:
        return lambda: probe.losses(indices).mean()

    net.load_state_dict(state)
    usual = _length(torch.autograd.grad(over(random)(), list(net.parameters())))
    share = len(groups) / count

    def clipped() -> Tensor:
        part = over(groups)()
        slopes = torch.autograd.grad(part, list(net.parameters()), retain_graph=True)
        scale = min(1.0, usual / max(_length(slopes), 1e-12))
        return (1 - share) * over(others)() + share * scale * part

    arms: dict[str, tuple[Callable[[], Tensor], float]] = {
        UNCHANGED: (over(everyone), rate),
        WITHOUT: (over(others), rate),
        RANDOM: (over(everyone[~torch.isin(everyone, random)]), rate),
        CLIPPED: (clipped, rate),
        SLOWER: (over(everyone), rate / 2),
    }
    found = {}
    for arm, (loss, own_rate) in arms.items():
        net.load_state_dict(state)
        optimizer = torch.optim.SGD(net.parameters(), lr=own_rate)
        losses = []
        for _ in range(steps):
            with torch.no_grad():
                losses.append(float(over(rest)()))
            descend(optimizer, loss())
        found[arm] = largest_rise(losses)
    return found


def _length(slopes: Sequence[Tensor]) -> float:
    return float(torch.stack([slope.norm() for slope in slopes]).norm())


def largest_rise(losses: Sequence[float]) -> float:
    """How far losses rise above the lowest one before.

    Example:
        >>> largest_rise([3.0, 1.0, 2.0, 0.5, 1.0])
        1.0
    """
    low, rise = float("inf"), 0.0
    for loss in losses:
        low = min(low, loss)
        rise = max(rise, loss - low)
    return rise
