"""Attention over a graph with edges of several types, one edge at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def graph_attention(layer: Any, x: Tensor, graph: Any, ends: list[str]) -> Tensor:
    """What one layer makes of one graph, from its weights; `ends` are the kinds types lead to."""
    heads, outside = layer.bias.shape[1:]
    out = torch.zeros(len(x), heads, outside, dtype=x.dtype)
    for kind, pairs in enumerate(graph.edges):
        for v in range(len(x)):
            if graph.kinds[v] == ends[kind]:
                out[v] += layer.bias[kind]
            coming = [source for source, destination in pairs if destination == v]
            for head in range(heads):
                rows = slice(head * outside, (head + 1) * outside)
                matrix = layer.weight[kind][rows]
                weights = []
                for u in coming:
                    score = float(layer.to_source[kind, head] @ (matrix @ x[u]))
                    score += float(layer.to_destination[kind, head] @ (matrix @ x[v]))
                    weights.append(math.exp(score if score > 0 else 0.2 * score))
                for u, weight in zip(coming, weights):
                    out[v, head] += weight / sum(weights) * (matrix @ x[u])
    return out


def relational_attention(net: Any, x: Tensor, graph: Any, ends: list[str]) -> Tensor:
    """Both layers of one graph: heads side by side after the first, averaged after the second."""
    inside = graph_attention(net.first, x, graph, ends)
    rows = torch.stack([torch.cat([head.clamp(min=0) for head in node]) for node in inside])
    made = graph_attention(net.second, rows, graph, ends)
    return torch.stack([sum(node) / len(node) for node in made])
