"""Attention over a small graph with edges of several types."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.errors import positive
from rectiflow.guidance.relation_graph import EDGE_TYPES, RelationGraph

if TYPE_CHECKING:
    from jaxtyping import Float

SLOPE = 0.2
"""Of the leaky ReLU on scores below zero."""


class GraphAttention(nn.Module):
    """One layer: every node gathers from its neighbours, by each type of edge apart.

    For an edge from u to v of a type with weights W, l, r and bias c, per head:
    `score = leaky_relu(l . W x_u + r . W x_v)`; a softmax over the edges of that type that lead to
    v weighs the `W x_u`, whose sum and c are what v gets; types are added up. A node without such
    an edge still gets the bias of every type that leads to its kind, and a single edge has weight
    one, whatever its score. All graphs of a batch, nodes, types and heads are computed at once.

    Args:
        inside: numbers of a node.
        outside: numbers of a node and head afterwards.
        heads: how many.

    Source: arXiv 1710.10903 per type of edge, summed over types; first weights as in the released
        code of arXiv 2403.20249 (Xavier normal, gain sqrt 2).
    """

    def __init__(self, inside: int, outside: int, heads: int) -> None:
        super().__init__()
        types = len(EDGE_TYPES)
        self.weight = nn.Parameter(torch.empty(types, heads * outside, inside))
        self.to_source = nn.Parameter(torch.empty(types, heads, outside))
        self.to_destination = nn.Parameter(torch.empty(types, heads, outside))
        self.bias = nn.Parameter(torch.zeros(types, heads, outside))
        for kind in range(types):
            nn.init.xavier_normal_(self.weight[kind], math.sqrt(2))
            nn.init.xavier_normal_(self.to_source[kind : kind + 1], math.sqrt(2))
            nn.init.xavier_normal_(self.to_destination[kind : kind + 1], math.sqrt(2))

    def forward(
        self, x: Float[Tensor, "*b n inside"], graph: RelationGraph
    ) -> Float[Tensor, "*b n heads outside"]:
        """What every node gathers."""
        mapped = torch.einsum("...ni,toi->...tno", x, self.weight)
        mapped = mapped.unflatten(-1, self.bias.shape[1:])
        sent = (mapped * self.to_source.unsqueeze(1)).sum(-1)
        asked = (mapped * self.to_destination.unsqueeze(1)).sum(-1)
        score = functional.leaky_relu(asked.unsqueeze(-2) + sent.unsqueeze(-3), SLOPE)
        edge = graph.adjacency(x.device).unsqueeze(-1)
        # The lowest number and not -inf, whose softmax over no edge at all would be NaN.
        share = score.masked_fill(~edge, torch.finfo(score.dtype).min).softmax(-2) * edge
        gathered = torch.einsum("...tdsh,...tsho->...dho", share, mapped)
        told = graph.receivers(x.device).to(x.dtype)
        return gathered + torch.einsum("td,tho->dho", told, self.bias)


class RelationalGraphAttention(nn.Module):
    """Two layers of graph attention that turn the nodes of a relation into vectors of their width.

    The order of two objects reaches the end of their sentence only through both layers: from the
    first object to the relation and from the relation to the second, then to the end.

    Args:
        width: numbers of a node, and of what is made of it.
        hidden: numbers of a node and head between the layers.
        heads: heads of both layers; concatenated after the first, averaged after the second.

    Raises:
        ValueError: a size that is not positive.

    Example:
        >>> from rectiflow.guidance.relation_graph import directed_relation
        >>> net = RelationalGraphAttention(16, hidden=8)
        >>> net(torch.randn(3, 5, 16), directed_relation()).shape
        torch.Size([3, 5, 16])

    Source: arXiv 2403.20249, section 4.2 and its released code.
    """

    def __init__(self, width: int, *, hidden: int = 512, heads: int = 2) -> None:
        super().__init__()
        for name, size in (("width", width), ("hidden", hidden), ("heads", heads)):
            positive(name, size)
        self.width = width
        self.config: dict[str, Any] = {"width": width, "hidden": hidden, "heads": heads}
        self.first = GraphAttention(width, hidden, heads)
        self.second = GraphAttention(heads * hidden, width, heads)

    def forward(
        self, nodes: Float[Tensor, "*b n width"], graph: RelationGraph
    ) -> Float[Tensor, "*b n width"]:
        """A vector for every node."""
        inside = self.first(nodes, graph).relu().flatten(-2)
        return self.second(inside, graph).mean(-2)
