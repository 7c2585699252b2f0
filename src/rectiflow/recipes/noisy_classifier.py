"""A classifier of noisy states, which balances views while they are sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.training.data import ImageData

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.fields import FlowModel


class NoisyClassifier(nn.Module):
    """Class scores of a noisy state at a time."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs + 1, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
            nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None]], 1))


def fit_noisy(data: ImageData, model: FlowModel, steps: int, seed: int) -> NoisyClassifier:
    """A classifier of states along the model's path, trained on images and noise alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(30_000 + seed)
        net = NoisyClassifier(data.batch([0])[0].numel(), len(data.classes))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data), (256,), generator=generator)
        images, label = data.batch(rows), data.condition(rows)["label"]
        t = torch.rand(len(rows), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        logits = net(model.path.interpolate(noise, images, t), t)
        optimizer.zero_grad()
        functional.cross_entropy(logits, label).backward()
        optimizer.step()
    return net.requires_grad_(False).eval()
