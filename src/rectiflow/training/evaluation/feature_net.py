"""The small image classifier whose penultimate layer serves as features, and its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.training.evaluation.labelled_images import LabelledImages

STEPS = 450
"""Training steps at least; three epochs where that is more."""


class FeatureNet(nn.Module):
    """A convolutional classifier: images to feature vectors, and those to logits.

    Images under 16 pixels keep their resolution and get 32 features; larger ones are halved three
    times at most and get 64. The global generator is left alone.

    Args:
        shape: (c, h, w) of the images.
        classes: number of classes.
        seed: of the initial weights.

    Example:
        >>> FeatureNet((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 32])
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int], classes: int, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        self.config: dict[str, Any] = {"shape": list(self.shape), "classes": int(classes)}
        channels, height, width = self.shape
        small = min(height, width) < 16
        self.dimension = 32 if small else 64
        widths, strides = ((16, 32), (1, 2)) if small else ((16, 32, 64), (2, 2, 2))
        layers: list[nn.Module] = []
        # The constructors draw from the global generator: leave it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for out, stride in zip(widths, strides):
                conv = nn.Conv2d(channels, out, 3, stride, padding=1)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                layers += [conv, nn.ReLU()]
                channels = out
            self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
            self.neck = nn.Linear(channels * 16, self.dimension)
            self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.dimension, classes))
        self.register_buffer("centre", torch.zeros(self.dimension))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Standardised features."""
        return (self.neck(self.body(images)) - self.centre) / self.scale

    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Class scores."""
        return self.head(self.neck(self.body(images)))


def fit(
    net: FeatureNet,
    train: LabelledImages,
    test: LabelledImages,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Train the classifier on labelled images and return its test accuracy.

    Adam on a one-cycle schedule, `STEPS` batches of 128 images or three epochs if that is more.

    Args:
        net: trained in place, left in evaluation mode.
        train: images and labels to learn.
        test: images and labels to measure the accuracy on.
        seed: of the batch order.
        progress: called with (step, steps).

    Returns:
        the share of test images classified rightly.
    """
    assert train.labels is not None
    assert test.labels is not None
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(np.asarray(train.labels), dtype=torch.int64)
    size = min(128, len(train))
    per_epoch = len(train) // size
    epochs = max(3, -(-STEPS // per_epoch))
    total = epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    net.train()
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(train), generator=generator)
        for indices in order[: per_epoch * size].split(size):
            loss = F.cross_entropy(net.logits(train.batch(indices.numpy())), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if progress:
                progress(done, total)
    net.eval()
    return _accuracy(net, test)


@torch.no_grad()
def standardise(net: FeatureNet, data: LabelledImages) -> None:
    """Centre the features of `data` and scale them to average variance one."""
    net.eval()
    features = torch.cat([net(data.batch(part)) for part in _parts(len(data))]).double()
    scale = (features - features.mean(0)).square().mean().sqrt()
    net.centre.copy_(features.mean(0))
    net.scale.copy_(scale if scale > 0 else torch.ones_like(scale))


@torch.no_grad()
def _accuracy(net: FeatureNet, data: LabelledImages) -> float:
    labels = np.asarray(data.labels)
    right = sum(
        int((net.logits(data.batch(part)).argmax(1).numpy() == labels[part]).sum())
        for part in _parts(len(data))
    )
    return right / len(data)


def _parts(count: int, size: int = 512) -> list[np.ndarray]:
    return [np.arange(i, min(i + size, count)) for i in range(0, count, size)]
