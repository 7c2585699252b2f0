"""The MMDiT on labelled images: does it obey its labels, and do its logits stay bounded?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.errors import NonFiniteLossError
from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.sampling import sample
from rectiflow.flows.snr_times import LogitNormal
from rectiflow.nets.joint_blocks import JointBlock
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class ConditionSettings:
    """A class-conditional MMDiT, and one that never sees a label."""

    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"depth": 2, "heads": 4, "head_dim": 16}
    )
    """Arguments of the network."""
    training: TrainerSettings = field(
        default_factory=lambda: stage(2000, batch_size=64, learning_rate=2e-3)
    )
    """Each training."""
    steps: int = 25
    """Euler steps of the samples."""
    samples: int = 1000
    """Samples that the classifier judges."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights, batches and noises."""


class Judge:
    """A classifier that has nothing to do with the generator: a support vector machine.

    Args:
        train: labelled images to learn from.
    """

    def __init__(self, train: ImageData) -> None:
        from sklearn.svm import SVC

        rows = np.arange(min(len(train), 20_000))
        images = train.batch(rows).flatten(1).numpy()
        self._machine = SVC(C=10.0).fit(images, train.condition(rows)["label"].numpy())

    def accuracy(self, images: Float[Tensor, "b c h w"], label: Int[Tensor, " b"]) -> float:
        """The share of images that are taken for their label."""
        return float(self._machine.score(images.flatten(1).numpy(), label.numpy()))


def accuracy(
    settings: ConditionSettings, data: ImageData, judge: Judge, seed: int, *, blind: bool
) -> tuple[float, Tensor]:
    """The accuracy of samples for given labels, and the samples of 0, 1, 2, ... first.

    Args:
        settings: sizes.
        data: labelled images.
        judge: the classifier.
        seed: of everything.
        blind: train on the null label only, so that nothing is learned about labels.
    """
    classes = len(data.classes)
    start = new_model("mmdit", data.shape, seed=seed, classes=classes, **settings.net_options)
    model = train(
        FlowMatching(
            start,
            Independent(data),
            LogitNormal(),
            condition_dropout=1.0 if blind else 0.1,
        ),
        replace(settings.training, seed=seed),
        title=f"MMDiT{' without labels' if blind else ''}, seed {seed}",
    )
    label = torch.arange(settings.samples) % classes
    generator = torch.Generator().manual_seed(4321)
    wanted = label.to(device_of(model))
    made = sample(
        model, settings.samples, steps=settings.steps, generator=generator, label=wanted
    ).cpu()
    return judge.accuracy(made, label), made


@dataclass(frozen=True)
class LogitSettings:
    """Training in bfloat16 from queries and keys that are far too large."""

    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"depth": 2, "heads": 2, "head_dim": 16}
    )
    """Arguments of the network."""
    factor: float = 8.0
    """By how much the weights of queries and keys are enlarged at the start."""
    training: TrainerSettings = field(
        default_factory=lambda: replace(stage(300, batch_size=64), precision="bf16", ema=0.0)
    )
    """The training."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and batches."""


@dataclass(frozen=True)
class Logits:
    """Attention logits after training.

    Attributes:
        largest: the largest q·k of any head, before the division by sqrt(d).
        bound: `d max|w_q| max|w_k|`, what the norm allows; infinite without one.
    """

    largest: float
    bound: float


def logits_after_training(
    settings: LogitSettings, data: ImageData, seed: int, *, qk_norm: str | None
) -> Logits:
    """Enlarge queries and keys, train, and look at the attention logits on a batch of data."""
    classes = len(data.classes)
    options = {**settings.net_options, "qk_norm": qk_norm, "classes": classes}
    model = new_model("mmdit", data.shape, seed=seed, **options)
    with torch.no_grad():
        for block in model.net.blocks:
            for stream in (block.context, block.image):
                layer = stream.attention.qkv
                layer.weight[: 2 * layer.in_features] *= settings.factor
    norm = "with" if qk_norm else "without"
    try:
        method = FlowMatching(model, Independent(data), LogitNormal())
        model = train(
            method, replace(settings.training, seed=seed), title=f"{norm} QK norm, seed {seed}"
        )
    except NonFiniteLossError:
        return Logits(math.inf, math.inf)
    rows = torch.arange(min(256, len(data)))
    generator = torch.Generator().manual_seed(seed)
    images = data.batch(rows)
    t = torch.rand(len(rows), generator=generator)
    x = model.path.interpolate(torch.randn(images.shape, generator=generator), images, t)
    device = device_of(model)
    condition = {name: value.to(device) for name, value in data.condition(rows).items()}
    return measured(model, x.to(device), t.to(device), **condition)


@torch.no_grad()
def measured(model: FlowModel, x: Tensor, t: Tensor, **condition: Tensor) -> Logits:
    """The largest logit of joint attention over all blocks, heads and pairs of tokens."""
    largest, bound = 0.0, 0.0
    with _seen(model) as seen:
        model.velocity(x, t, **condition)
    for block, (context, image) in zip(model.net.blocks, seen):
        queries = torch.cat([q for q in (context[0], image[0]) if q is not None], 1)
        keys = torch.cat([context[1], image[1]], 1)
        logits = torch.einsum("bihd,bjhd->bhij", queries.float(), keys.float())
        largest = max(largest, float(logits.abs().max()))
        allowed = _allowed(block)
        bound = max(bound, allowed)
    return Logits(largest, bound)


def _allowed(block: JointBlock) -> float:
    """What the norm of a block allows: both factors have length at most sqrt(d) max|w|."""
    parts = (block.context.attention, block.image.attention)
    if parts[1].query_norm is None:
        return math.inf
    width = parts[1].query_norm.numel()
    most = [
        max(float(getattr(part, name).abs().max()) for part in parts)
        for name in ("query_norm", "key_norm")
    ]
    return width * most[0] * most[1]


@contextlib.contextmanager
def _seen(model: FlowModel) -> Iterator[list[list[Any]]]:
    """For every block what its two streams ask and answer with during the block of code."""
    seen: list[list[Any]] = [[None, None] for _ in model.net.blocks]
    handles = []
    for index, block in enumerate(model.net.blocks):
        for place, stream in enumerate((block.context, block.image)):

            def keep(_: Any, given: Any, made: Any, index: int = index, place: int = place) -> None:
                seen[index][place] = made

            handles.append(stream.attention.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
