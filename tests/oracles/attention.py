"""Self-attention with the softmax written out, one sample and one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v of shape (places, d)."""
    rows = []
    for query in q:
        scores = (k @ query) / query.numel() ** 0.5
        weights = scores.exp() / scores.exp().sum()
        rows.append((weights[:, None] * v).sum(dim=0))
    return torch.stack(rows)


def self_attention_block(block: torch.nn.Module, x: Tensor) -> Tensor:
    """The whole block of `rectiflow.nets.SelfAttention`, from its weights, by loops."""
    b, c, h, w = x.shape
    z = block.norm(x)
    result = torch.empty_like(x)
    d = c // block.heads
    for i in range(b):
        tokens = z[i].reshape(c, h * w).T
        projected = tokens @ block.qkv.weight.T + block.qkv.bias
        q, k, v = projected[:, :c], projected[:, c : 2 * c], projected[:, 2 * c :]
        parts = [slice(n * d, (n + 1) * d) for n in range(block.heads)]
        mixed = torch.cat([attention(q[:, s], k[:, s], v[:, s]) for s in parts], dim=1)
        y = mixed @ block.out.weight.T + block.out.bias
        result[i] = (x[i] + y.T.reshape(c, h, w)) / 2**0.5
    return result
