"""Trainings of small classifiers: the same first weights and batches for every optimizer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.training.data import load

Watch = Callable[[int, nn.Module], None]
"""Called with the step's number and the network, between the gradients and the step."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Standardised images with their labels.

    Attributes:
        inputs: images trained on, `(n, c, h, w)`, mean 0 and deviation 1 in each channel.
        labels: their classes.
        test_inputs: images judged on, standardised by the moments of the others.
        test_labels: their classes.
        classes: number of classes.
        name: the data's spec string.
    """

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    name: str

    def tuning(self) -> LabelledImages:
        """The training images alone: the last fifth judges, the others are trained on."""
        kept = len(self.inputs) - len(self.inputs) // 5
        return replace(
            self,
            inputs=self.inputs[:kept],
            labels=self.labels[:kept],
            test_inputs=self.inputs[kept:],
            test_labels=self.labels[kept:],
        )


@cache
def standardised(spec: str, *, train: int, test: int, size: int | None = None) -> LabelledImages:
    """The first images of both splits; digits where fashion-mnist is not on this machine.

    Args:
        spec: the data's spec string.
        train: most images trained on.
        test: most images judged on.
        size: side in pixels; None keeps that of the data.

    Raises:
        FileNotFoundError: other data are not there.
    """
    try:
        splits = [load(spec, split=split, size=size) for split in ("train", "test")]
    except FileNotFoundError:
        if spec != "fashion-mnist":
            raise
        spec = "digits"
        splits = [load(spec, split=split) for split in ("train", "test")]
    rows = [torch.arange(min(len(data), n)) for data, n in zip(splits, (train, test))]
    x, held = (data.batch(part) for data, part in zip(splits, rows))
    labels, held_labels = (data.condition(part)["label"] for data, part in zip(splits, rows))
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return LabelledImages(
        (x - mean) / deviation,
        labels,
        (held - mean) / deviation,
        held_labels,
        len(splits[0].classes),
        spec,
    )


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        accuracy: on the test images, in per cent.
        losses: the loss of every step.
        epochs: passes over the images.
    """

    accuracy: float
    losses: tuple[float, ...]
    epochs: int = 1

    def means(self, parts: int | None = None) -> list[float]:
        """Mean losses of equally long parts of the training, its epochs by default."""
        size = max(1, len(self.losses) // (parts or self.epochs))
        starts = range(0, len(self.losses) - size + 1, size)
        return [statistics.fmean(self.losses[start : start + size]) for start in starts]


def train_classifier(
    net: nn.Module,
    images: LabelledImages,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    cosine: bool = True,
    smoothing: float = 0.0,
    watch: Watch | None = None,
) -> Trained:
    """Train with cross-entropy on shuffled epochs.

    Args:
        net: trained in place.
        images: what it learns and is judged on.
        optimizer: over its weights.
        epochs: passes over the images; the last, smaller batch of each is dropped.
        batch_size: images of a step.
        seed: of the order of images.
        cosine: let the learning rate fall to zero along half a cosine.
        smoothing: of the labels.
        watch: sees every step.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    order = torch.Generator().manual_seed(seed)
    per_epoch = len(images.inputs) // batch_size
    losses: list[Tensor] = []
    for epoch in range(epochs):
        rows = torch.randperm(len(images.inputs), generator=order)[: per_epoch * batch_size]
        for place, batch in enumerate(rows.view(per_epoch, batch_size)):
            step = epoch * per_epoch + place
            if cosine:
                share = 0.5 * (1 + math.cos(math.pi * step / (epochs * per_epoch)))
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * share
            optimizer.zero_grad()
            loss = functional.cross_entropy(
                net(images.inputs[batch]), images.labels[batch], label_smoothing=smoothing
            )
            loss.backward()
            if watch is not None:
                watch(step, net)
            optimizer.step()
            losses.append(loss.detach())
    return Trained(accuracy(net, images), tuple(torch.stack(losses).tolist()), epochs)


def new_classifier(
    make: Callable[..., nn.Module], images: LabelledImages, *sizes: int, seed: int
) -> nn.Module:
    """A network for the images whose first weights depend on the seed alone.

    Args:
        make: `pooled_cnn` or another, called with channels, side, the sizes and classes.
        images: what it is for.
        *sizes: such as its width.
        seed: of the weights.
    """
    channels, side = images.inputs.shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(channels, side, *sizes, images.classes)


@torch.no_grad()
def accuracy(net: nn.Module, images: LabelledImages) -> float:
    """Per cent of the test images whose class is found."""
    net.eval()
    right = [
        net(x).argmax(1) == labels
        for x, labels in zip(images.test_inputs.split(1000), images.test_labels.split(1000))
    ]
    net.train()
    return 100 * float(torch.cat(right).float().mean())


def best_rate(
    grid: tuple[float, ...], seeds: tuple[int, ...], score: Callable[[float, int], float]
) -> float:
    """The learning rate with the highest mean score on tuning seeds; a single one is not tried."""
    if len(grid) == 1:
        return grid[0]
    return max(grid, key=lambda rate: statistics.fmean(score(rate, seed) for seed in seeds))
