"""What an edit keeps against what it changes: RF-Edit over injected steps, on labelled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.flows.snr_times import LogitNormal
from rectiflow.images import RFEdit, decode, invert
from rectiflow.recipes.joint_attention import Judge
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class EditSettings:
    """A small class-conditional MMDiT that turns images of one class into another."""

    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"depth": 4, "heads": 4, "head_dim": 16}
    )
    """Arguments of the network."""
    training: TrainerSettings = field(
        default_factory=lambda: stage(2000, batch_size=64, learning_rate=2e-3)
    )
    """Its training."""
    steps: int = 15
    """Solver steps each way."""
    inject: tuple[int, ...] = (0, 2, 5, 15)
    """Numbers of steps that replay attention values."""
    guidance: float = 2.0
    """Scale toward the target class."""
    plain: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Scales of edits without injection, for comparison at equal accuracy."""
    images: int = 200
    """Held-out images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""


@dataclass(frozen=True)
class Point:
    """One way to edit.

    Attributes:
        distance: root mean square distance of edits from their sources.
        accuracy: share of edits that a classifier takes for the target class.
    """

    distance: float
    accuracy: float


@dataclass(frozen=True)
class Curves:
    """The trade-off of one seed.

    Attributes:
        injected: by number of injected steps.
        plain: by guidance scale, without injection.
        sheet: sources, then their edits by number of injected steps, an image a row.
    """

    injected: dict[int, Point]
    plain: dict[float, Point]
    sheet: Tensor


def trade_off(
    settings: EditSettings, data: ImageData, held: ImageData, judge: Judge, seed: int
) -> Curves:
    """Train, edit held-out images into other classes, and measure what is kept and changed."""
    classes = len(data.classes)
    start = new_model("mmdit", data.shape, seed=seed, classes=classes, **settings.net_options)
    model: FlowModel = train(
        FlowMatching(start, Independent(data), LogitNormal(), condition_dropout=0.1),
        replace(settings.training, seed=seed),
        title=f"MMDiT to edit with, seed {seed}",
    )
    rows = list(range(min(settings.images, len(held))))
    images, label = held.batch(rows), held.condition(rows)["label"]
    # Every other class in turn.
    target = (label + 1 + torch.arange(len(rows)) % (classes - 1)) % classes

    device = device_of(model)
    given, source, wanted = images.to(device), label.to(device), target.to(device)
    options: dict[str, Any] = {"steps": settings.steps, "solver": "rf-solver"}
    noise = invert(model, given, label=source, **options)

    def plain(guidance: float) -> Tensor:
        return decode(ClassifierFreeGuidance(model, guidance), noise, label=wanted, **options)

    def edited(inject: int) -> Tensor:
        if not inject:
            return plain(settings.guidance)
        edit = RFEdit(model, inject=inject, guidance=settings.guidance, **options)
        return edit(given, source={"label": source}, target={"label": wanted}).images

    def point(made: Tensor) -> Point:
        made = made.cpu()
        gap = (made.clamp(-1, 1) - images).square().flatten(1).mean(1).sqrt()
        return Point(float(gap.mean()), judge.accuracy(made, target))

    found = {inject: edited(inject) for inject in settings.inject}
    shown = torch.stack([images[:10], *(made[:10].cpu() for made in found.values())], 1)
    return Curves(
        {inject: point(made) for inject, made in found.items()},
        {scale: point(plain(scale)) for scale in settings.plain},
        shown.flatten(0, 1),
    )


def largest_rise(values: Sequence[float]) -> float:
    """The largest step up in a row of numbers; negative if all steps go down.

    Example:
        >>> largest_rise([3.0, 1.0, 2.0])
        1.0
    """
    return max(after - before for before, after in pairwise(values))


def advantage(curves: Curves) -> float:
    """Distance of plain edits over that of edits with injection, at equal accuracy.

    Plain edits are interpolated over their guidance scales. The mean is over the numbers of
    injected steps with an accuracy within their reach; NaN where there is none.
    """
    plain = sorted((p.accuracy, p.distance) for p in curves.plain.values())
    accuracies, kept = [p[0] for p in plain], [p[1] for p in plain]
    ratios = [
        float(np.interp(point.accuracy, accuracies, kept)) / point.distance
        for inject, point in curves.injected.items()
        if inject and accuracies[0] <= point.accuracy <= accuracies[-1]
    ]
    return float(np.mean(ratios)) if ratios else float("nan")
