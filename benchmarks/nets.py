"""The networks that the benchmarks run: plain, and free of anything of ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """A velocity for points in the plane, 4.5 thousand parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([x, t[:, None]], 1))


class Convolutions(nn.Module):
    """A stack of 3x3 convolutions over one channel and the time."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1), nn.SiLU()]
        for _ in range(hidden):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([x, t[:, None, None, None].expand_as(x)], 1))
