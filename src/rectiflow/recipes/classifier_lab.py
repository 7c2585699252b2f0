"""Trainings of small classifiers: the same first weights and batches for every optimizer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
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


@cache
def standardised(spec: str, *, train: int, test: int, size: int | None = None) -> LabelledImages:
    """The first images of both splits; digits where the data are not on this machine.

    Args:
        spec: the data's spec string.
        train: most images trained on.
        test: most images judged on.
        size: side in pixels; None keeps that of the data.
    """
    try:
        splits = [load(spec, split=split, size=size) for split in ("train", "test")]
    except FileNotFoundError:
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


def normalised_cnn(images: LabelledImages, *, width: int = 16, seed: int) -> nn.Sequential:
    """Two convolutions without bias, each normalised over the batch and pooled; a linear head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        channels = images.inputs.shape[1]
        for out in (width, 2 * width):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = out
        features = channels * math.prod(side // 4 for side in images.inputs.shape[2:])
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, images.classes))


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        accuracy: on the test images, in per cent.
        losses: mean training loss of each epoch.
    """

    accuracy: float
    losses: tuple[float, ...]


def train_classifier(
    net: nn.Module,
    images: LabelledImages,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    cosine: bool = True,
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
        watch: sees every step.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    order = torch.Generator().manual_seed(seed)
    per_epoch = len(images.inputs) // batch_size
    losses = []
    for epoch in range(epochs):
        rows = torch.randperm(len(images.inputs), generator=order)[: per_epoch * batch_size]
        total = torch.zeros(())
        for place, batch in enumerate(rows.view(per_epoch, batch_size)):
            step = epoch * per_epoch + place
            if cosine:
                share = 0.5 * (1 + math.cos(math.pi * step / (epochs * per_epoch)))
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * share
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images.inputs[batch]), images.labels[batch])
            loss.backward()
            if watch is not None:
                watch(step, net)
            optimizer.step()
            total += loss.detach()
        losses.append(float(total) / per_epoch)
    return Trained(accuracy(net, images), tuple(losses))


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
