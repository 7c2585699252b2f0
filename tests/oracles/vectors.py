"""Loops over vectors, one number at a time where that is affordable."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rows(a: Tensor, start: int = 1) -> list[Tensor]:
    """Each vector of `a` as a 1-D tensor in float64."""
    count = math.prod(a.shape[:start])
    return list(a.double().reshape(count, -1).unbind(0))


def inner(a: Tensor, b: Tensor, start: int = 1) -> list[float]:
    """Exactly rounded sums of products."""
    return [
        math.fsum(x * y for x, y in zip(u.tolist(), v.tolist()))
        for u, v in zip(rows(a, start), rows(b, start))
    ]


def split_parallel(v: Tensor, r: Tensor, start: int = 1) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt with a normalised reference, vector by vector."""
    parallel = []
    for x, y in zip(rows(v, start), rows(r, start)):
        length = y.norm()
        unit = y / length if length > 0 else torch.zeros_like(y)
        parallel.append(torch.dot(x, unit) * unit)
    along = torch.stack(parallel).reshape(v.shape)
    return along, v.double() - along


def clip_norm(v: Tensor, bound: float, start: int = 1) -> Tensor:
    """Scale down the long vectors, vector by vector."""
    out = []
    for x in rows(v, start):
        length = math.sqrt(math.fsum(e * e for e in x.tolist()))
        out.append(x * (bound / length) if length > bound else x)
    return torch.stack(out).reshape(v.shape)


def clip_pixels(v: Tensor, bound: float, order: float) -> Tensor:
    """Scale down the bright pixels, pixel by pixel."""
    out = v.double().clone()
    for b in range(v.shape[0]):
        for i in range(v.shape[2]):
            for j in range(v.shape[3]):
                length = torch.linalg.vector_norm(out[b, :, i, j], ord=order)
                if length > bound:
                    out[b, :, i, j] *= bound / length
    return out
