"""Image-to-image transfer: a flow between two classes of images, without pairs.

The paper's images are AFHQ's animals at 512 pixels, its features come from an ImageNet network.
Here the digit 1 becomes a 7 (or, in `FASHION`, a sneaker a boot), with features of a small
classifier of the two domains. A second, independent classifier of all classes judges.

Source: arXiv 2209.03003, section 5.3.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.metrics import transport_cost
from rectiflow.images.domain_transfer import DomainTransfer, domain_classifier, transfer
from rectiflow.images.latent_editing import vary
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import new_model, numbers, stage, train
from rectiflow.training.data import ImageData, load
from rectiflow.training.evaluation.feature_net import FeatureNet, fit
from rectiflow.training.figures import compare_samples, save_images
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.report import cell
from rectiflow.training.runs import Run
from rectiflow.training.trainer import TrainerSettings

CLAIM = (
    "A flow trained between two unpaired domains carries images into the other domain and keeps "
    "them closer to their originals than random pairing."
)
FEATURES, PLAIN = "feature loss", "plain loss"
UNCHANGED, RANDOM = "source unchanged", "random target image"
JUDGE = 900
"""Added to a seed for the judge's weights: other weights than those of the features."""


@dataclass(frozen=True)
class Settings:
    """Domains, networks and trainings."""

    data: str = "digits"
    """Labelled images, by spec string."""
    size: int | None = None
    """Side to which images are cut and scaled."""
    source: str = "1"
    """Class to start from."""
    target: str = "7"
    """Class to reach."""
    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(default_factory=lambda: {"width": 128, "depth": 2})
    """Its arguments."""
    plain: float = 0.1
    """Weight of the plain loss beside the features' loss."""
    transfer: TrainerSettings = field(default_factory=lambda: stage(2500))
    """Training of a transfer."""
    generator: TrainerSettings = field(default_factory=lambda: stage(3000))
    """Training of the flow from noise to all classes, for the edits."""
    steps: int = 100
    """Euler steps."""
    kept: tuple[float, ...] = (1.0, 0.95, 0.9, 0.8, 0.6, 0.3)
    """Shares of the latent kept in the edits."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""


FASHION = Settings(
    data="fashion-mnist",
    source="Sneaker",
    target="Ankle boot",
    net="unet-xs",
    net_options={},
    transfer=stage(1500),
    generator=stage(2000),
    steps=50,
)
PRESETS = {
    "quick": Settings(
        net_options={"width": 32, "depth": 1},
        transfer=stage(60, batch_size=32),
        generator=stage(40, batch_size=32),
        steps=10,
        kept=(1.0, 0.5),
        seeds=(0,),
    ),
    "default": Settings(),
    # The optimizer's settings for AFHQ are not published: those of CIFAR-10.
    "paper": Settings(
        data="folder:afhq",
        size=512,
        source="cat",
        target="wild",
        net="unet-256",
        net_options={},
        transfer=replace(stage(300_000, batch_size=8, learning_rate=2e-4), ema=0.9999),
        generator=replace(stage(300_000, batch_size=8, learning_rate=2e-4), ema=0.9999),
    ),
}


@dataclass(frozen=True)
class Transferred:
    """Images after transfer, and how they score.

    Attributes:
        images: one a source image.
        reached: share that the judge takes for the target class.
        left: share that it still takes for the source class.
        moved: mean squared distance to the own source image.
        ratio: that over the distance to other images' sources.
    """

    images: Tensor
    reached: float
    left: float
    moved: float
    ratio: float


def run(settings: Settings, run: Run) -> Result:
    """Transfer by both losses for every seed, the edits for the first."""
    whole, held = (load(settings.data, split=s, size=settings.size) for s in ("train", "test"))
    ends = [settings.source, settings.target]
    source, target = (whole.only(name) for name in ends)
    images = _all(held.only(settings.source))
    arms: dict[str, list[Transferred]] = {n: [] for n in (FEATURES, PLAIN, UNCHANGED, RANDOM)}
    accuracies: dict[str, list[float]] = {"judge": [], "domain classifier": []}
    judge: FeatureNet | None = None
    for seed in settings.seeds:
        judge = FeatureNet(whole.shape, len(whole.classes), seed=seed + JUDGE)
        accuracies["judge"].append(fit(judge, whole, held, seed=seed + JUDGE))
        features, accuracy = domain_classifier(source, target, seed=seed)
        accuracies["domain classifier"].append(accuracy)
        made = {
            FEATURES: _carry(settings, source, target, images, features, seed),
            PLAIN: _carry(settings, source, target, images, None, seed),
            UNCHANGED: images,
            RANDOM: _random(target, len(images), seed),
        }
        for name, found in made.items():
            arms[name].append(_score(found, images, judge, whole, settings))
    assert judge is not None
    edits = _edits(settings, whole, held, judge)
    methods = {name: arms[name] for name in (FEATURES, PLAIN)}
    measures = {
        f"share judged {settings.target!r}": lambda t: t.reached,
        f"share still judged {settings.source!r}": lambda t: t.left,
        "squared pixel distance to the source": lambda t: t.moved,
    }
    ratio = "distance to own source / to others' sources"
    return Result(
        slug="domain-transfer",
        claim=CLAIM,
        numbers=[
            *numbers(arms, measures),
            *numbers(methods, {ratio: lambda t: t.ratio}),
            *(Number("accuracy", name, tuple(values)) for name, values in accuracies.items()),
            *edits.numbers,
        ],
        checks=[
            Check(
                f"share judged {settings.target!r}, {FEATURES}",
                tuple(t.reached for t in arms[FEATURES]),
                at_least=0.8,
            ),
            # The specification asks for less than random pairing; a tenth less is a clear pass.
            Check(
                f"{ratio}, {FEATURES}",
                tuple(t.ratio for t in arms[FEATURES]),
                at_most=0.9,
                broken=1.0,
            ),
        ],
        seeds=settings.seeds,
        notes=[
            f"{len(images)} held-out images of {settings.source!r}, which no training saw; the "
            f"judge is a classifier of all {len(whole.classes)} classes with weights of its own.",
            "Random pairing is the same transferred images, each beside every other source.",
        ],
        pictures=_draw(settings, images, arms, edits, run),
    )


def _carry(
    settings: Settings,
    source: ImageData,
    target: ImageData,
    images: Tensor,
    features: FeatureNet | None,
    seed: int,
) -> Tensor:
    """Train a transfer and apply it."""
    start = new_model(settings.net, source.shape, seed=seed, **settings.net_options)
    if features is not None:
        features = features.to("cuda" if torch.cuda.is_available() else "cpu")
    method = DomainTransfer(start, source, target, features=features, plain=settings.plain)
    title = f"transfer, {PLAIN if features is None else FEATURES}"
    model = train(method, replace(settings.transfer, seed=seed), title=title)
    found = transfer(
        model, images.to(device_of(model)), steps=settings.steps, solver="euler", batch_size=256
    )
    return found.cpu()


@torch.no_grad()
def _score(
    found: Tensor, images: Tensor, judge: FeatureNet, data: ImageData, settings: Settings
) -> Transferred:
    labels = torch.cat([judge.logits(part.clamp(-1, 1)).argmax(1) for part in found.split(256)])
    reached, left = (
        float((labels == data.classes.index(name)).double().mean())
        for name in (settings.target, settings.source)
    )
    moved = transport_cost(images, found)
    return Transferred(found, reached, left, moved, moved / _shuffled_cost(images, found))


def _shuffled_cost(images: Tensor, found: Tensor) -> float:
    """The mean squared distance over all pairs of different rows, exactly."""
    a, b = images.double().flatten(1), found.double().flatten(1)
    squares = torch.cdist(a, b).square()
    count = len(a)
    return float((squares.sum() - squares.diagonal().sum()) / (count * (count - 1)))


@dataclass(frozen=True)
class Edits:
    """Encoded, edited and decoded images.

    Attributes:
        rows: the share of the latent kept, with the images: shrunk, and with fresh noise.
        numbers: distance to the original and share judged to be of the same class.
    """

    rows: dict[float, tuple[Tensor, Tensor]]
    numbers: list[Number]


@torch.no_grad()
def _edits(settings: Settings, data: ImageData, held: ImageData, judge: FeatureNet) -> Edits:
    """Variations of held-out images by a flow from noise to all classes, for the first seed."""
    seed = settings.seeds[0]
    start = new_model(settings.net, data.shape, seed=seed, **settings.net_options)
    unlabelled = replace(data, labels=None, classes=())
    with torch.enable_grad():
        model: FlowModel = train(
            FlowMatching(start, Independent(unlabelled)),
            replace(settings.generator, seed=seed),
            title="flow for edits",
        )
    images = held.batch(torch.arange(min(len(held), 200)))
    labels = torch.from_numpy(np.asarray(held.labels))[: len(images)]
    rows, found = {}, []
    for kept in settings.kept:
        pair = []
        for word, generator in (
            ("shrunk", None),
            ("fresh noise", torch.Generator().manual_seed(seed)),
        ):
            edited = vary(
                model,
                images.to(device_of(model)),
                keep=kept,
                generator=generator,
                steps=settings.steps // 2,
            ).cpu()
            same = (judge.logits(edited.clamp(-1, 1)).argmax(1) == labels).double().mean()
            arm = f"{word}, {kept:g} of the latent kept"
            found += [
                Number("edit: squared pixel distance", arm, (transport_cost(images, edited),)),
                Number("edit: share judged as before", arm, (float(same),)),
            ]
            pair.append(edited)
        rows[kept] = (pair[0], pair[1])
    return Edits(rows, found)


def _draw(
    settings: Settings,
    images: Tensor,
    arms: Mapping[str, Sequence[Transferred]],
    edits: Edits,
    run: Run,
) -> dict[Path, str]:
    """Sources above their transfers, and the strip of edits."""
    shown = min(12, len(images))
    panels = {"source": images, **{name: arms[name][0].images for name in (FEATURES, PLAIN)}}
    strip = torch.cat([panel[:shown] for panel in panels.values()])
    above = save_images(strip, run.path("transfers.png"), columns=shown)
    first = {name: cell(statistics.fmean(t.reached for t in arms[name])) for name in arms}
    sheets = {}
    for kept, (shrunk, fresh) in edits.rows.items():
        sheets[f"{kept:g} kept"] = torch.cat([shrunk[:8], fresh[:8]])
    strips = compare_samples(sheets, run.path("edits.png"))
    return {
        above: f"Held-out images of {settings.source!r} (top row), carried to {settings.target!r} "
        f"by the feature loss (middle, {first[FEATURES]} judged {settings.target!r}) and the plain "
        f"loss (bottom, {first[PLAIN]}), seed {settings.seeds[0]}.",
        strips: "Images encoded, edited and decoded. In each sheet the first half only shrinks the "
        "latent, the second half adds fresh noise; the less is kept, the more typical they become.",
    }


def _all(data: ImageData) -> Tensor:
    return data.batch(torch.arange(len(data)))


def _random(target: ImageData, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return target.batch(torch.randint(len(target), (count,), generator=generator))
