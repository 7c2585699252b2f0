"""Small models and fields that the tests of alignment share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.flows import FlowModel
from rectiflow.nets import MLP


def model(
    shape: tuple[int, ...] = (3,), *, classes: int = 0, dropout: float = 0.0, seed: int = 0
) -> FlowModel:
    """A model whose weights all say something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(shape=shape, width=8, depth=2, classes=classes, dropout=dropout, zero=False)
    return FlowModel(net, shape=shape, sampling={"solver": "euler", "steps": 4})


def noises(count: int = 5, shape: tuple[int, ...] = (3,), seed: int = 1) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """The field `theta x + shift`."""

    def __init__(self, theta: float = 0.5, shift: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return (self.theta * x + self.shift).to(x.dtype)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, which are cleared."""
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found
