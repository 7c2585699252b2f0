"""Small classifiers of images, and what they are judged on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.training.data import load


@dataclass(frozen=True)
class Images:
    """Standardised images with labels, for training and for judging."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    name: str

    @classmethod
    def of(cls, spec: str, train: int, test: int, *, size: int | None = None) -> Images:
        """The first images of both splits, standardised by those of the first.

        Digits stand in for data that are not there.
        """
        try:
            splits = [load(spec, split=split, size=size) for split in ("train", "test")]
        except FileNotFoundError:
            spec = "digits"
            splits = [load(spec, split=split) for split in ("train", "test")]
        rows = [range(min(len(s), n)) for s, n in zip(splits, (train, test))]
        (x, held), labels = (
            [s.batch(r) for s, r in zip(splits, rows)],
            [s.condition(r)["label"] for s, r in zip(splits, rows)],
        )
        mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        x, held = (x - mean) / deviation, (held - mean) / deviation
        return cls(x, labels[0], held, labels[1], len(splits[0].classes), spec)


def small_cnn(channels: int, width: int, classes: int) -> nn.Module:
    """Three strided convolutions with batch norm, the mean over places, and a linear answer."""
    layers: list[nn.Module] = []
    for place, kernel in enumerate((5, 3, 3)):
        out = width << place
        layers += [
            nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


class PatchTransformer(nn.Module):
    """A small vision transformer: four by four patches, learned places, mean of the tokens.

    Args:
        channels: of the images.
        side: of the images, in pixels, a multiple of four.
        width: of the tokens.
        depth: blocks.
        heads: of the attention.
        classes: of the answers.
    """

    def __init__(
        self, channels: int, side: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, side // 4, stride=side // 4)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.places
        return self.head(self.blocks(tokens).mean(1))


@torch.no_grad()
def judged(net: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    net.eval()
    answers = torch.cat([net(part) for part in x.split(1000)])
    net.train()
    right = answers.argmax(1) == labels
    return float(functional.cross_entropy(answers, labels)), float(right.float().mean())
