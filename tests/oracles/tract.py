"""TrAct by its definition: rows taken one weight at a time, and an explicit inverse."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def rows(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the weight multiplies, one matrix a group: column j is the output of unit weight j."""
    probe = copy.deepcopy(layer)
    probe.bias = None
    groups = getattr(layer, "groups", 1)
    outputs, width = len(layer.weight), layer.weight[0].numel()
    columns = []
    for j in range(width):
        unit = torch.zeros(width, dtype=layer.weight.dtype)
        unit[j] = 1
        weight = unit.reshape(1, *layer.weight.shape[1:]).expand_as(layer.weight)
        probe.weight = nn.Parameter(weight.clone())
        z = probe(x).detach()
        channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim
        columns.append(z.movedim(channels, -1))
    flat = torch.stack(columns, -1).reshape(-1, outputs, width)
    return [flat[:, k * (outputs // groups)] for k in range(groups)]


def gradient(layer: nn.Module, x: Tensor, plain: Tensor, lam: float) -> Tensor:
    """The plain weight gradient times the inverse of the damped second moment, by group."""
    parts = plain.flatten(1).chunk(getattr(layer, "groups", 1))
    found = []
    for part, a in zip(parts, rows(layer, x)):
        damped = a.T @ a / len(a) + lam * torch.eye(a.shape[1], dtype=a.dtype)
        found.append(part @ torch.linalg.inv(damped))
    return torch.cat(found).reshape(plain.shape)
