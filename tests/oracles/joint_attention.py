"""A block of the MMDiT, head by head and token by token, from its state dict."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _rms(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _qkv(state: dict[str, Tensor], name: str, x: Tensor) -> list[Tensor]:
    query, key, value = _linear(state, f"{name}.qkv", x).split(x.shape[-1], dim=-1)
    return [query, key, value]


def _attention(
    parts: list[tuple[dict[str, Tensor], str, list[Tensor]]], heads: int
) -> list[Tensor]:
    """What each part's tokens read from the tokens of all parts."""
    width = parts[0][2][0].shape[-1]
    d = width // heads
    results = [torch.zeros_like(part[2][0]) for part in parts]
    for head in range(heads):
        cut = slice(head * d, (head + 1) * d)
        keys = torch.cat(
            [_rms(qkv[1][..., cut], state.get(f"{name}.key_norm")) for state, name, qkv in parts], 1
        )
        values = torch.cat([qkv[2][..., cut] for _, _, qkv in parts], 1)
        for result, (state, name, qkv) in zip(results, parts):
            queries = _rms(qkv[0][..., cut], state.get(f"{name}.query_norm"))
            for b in range(queries.shape[0]):
                for token in range(queries.shape[1]):
                    logits = keys[b] @ queries[b, token] / math.sqrt(d)
                    weights = (logits - logits.max()).exp()
                    result[b, token, cut] = (weights / weights.sum()) @ values[b]
    return results


def joint_block(
    state: dict[str, Tensor], context: Tensor, x: Tensor, e: Tensor, *, heads: int
) -> tuple[Tensor, Tensor]:
    """The two streams after the block; `e` is activated."""
    width = x.shape[-1]
    said = _linear(state, "context.modulation", e)[:, None].split(width, dim=-1)
    seen = _linear(state, "image.modulation", e)[:, None].split(width, dim=-1)
    read = _norm(context) * (1 + said[1]) + said[0]
    look = _norm(x) * (1 + seen[1]) + seen[0]
    own = _qkv(state, "image.attention", look)
    answers = _attention(
        [
            (state, "context.attention", _qkv(state, "context.attention", read)),
            (state, "image.attention", own),
        ],
        heads,
    )
    y = x + seen[2] * _linear(state, "image.attention.out", answers[1])
    if len(seen) == 9:
        again = _qkv(state, "image.dual", _norm(x) * (1 + seen[7]) + seen[6])
        alone = _attention([(state, "image.dual", again)], heads)[0]
        y = y + seen[8] * _linear(state, "image.dual.out", alone)
    hidden = _gelu(_linear(state, "image.up", _norm(y) * (1 + seen[4]) + seen[3]))
    y = y + seen[5] * _linear(state, "image.down", hidden)
    if len(said) == 2:
        return context, y
    context = context + said[2] * _linear(state, "context.attention.out", answers[0])
    hidden = _gelu(_linear(state, "context.up", _norm(context) * (1 + said[4]) + said[3]))
    return context + said[5] * _linear(state, "context.down", hidden), y
