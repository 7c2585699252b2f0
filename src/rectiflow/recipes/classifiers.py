"""Small classifiers of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pooled_cnn(channels: int, side: int, width: int, classes: int) -> nn.Sequential:
    """Two convolutions without bias, each with batch norm and pooled, and a linear answer."""
    layers: list[nn.Module] = []
    for out in (width, 2 * width):
        layers += [
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = out
    head = nn.Linear(channels * (side // 4) ** 2, classes)
    return nn.Sequential(*layers, nn.Flatten(), head)


def strided_cnn(channels: int, side: int, width: int, classes: int) -> nn.Module:
    """Three strided convolutions with batch norm, the mean over places, and a linear answer.

    Images of any side will do.
    """
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
