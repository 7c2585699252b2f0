"""Who does what to whom as a graph: words and ends of sentences, and what may tell what to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from rectiflow.errors import unknown

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

KINDS: Mapping[str, str] = {
    "first": "object",
    "relation": "relation",
    "second": "object",
    "first-end": "end",
    "sentence-end": "end",
}
"""Role of a node: the kind of node it is.

For "A contains B" the roles are the words A, contains and B, the end-of-text vector of a sentence
about A alone, and that of the whole sentence.
"""
ROLES = tuple(KINDS)
ENDS = ("first-end", "sentence-end")
EDGE_TYPES: Mapping[str, tuple[str, str]] = {
    "object-object": ("object", "object"),
    "object-relation": ("object", "relation"),
    "relation-object": ("relation", "object"),
    "object-end": ("object", "end"),
    "relation-end": ("relation", "end"),
}
"""Type of an edge: the kinds of nodes it goes from and to."""
Edges = Mapping[str, Sequence[tuple[str, str]]]

_TO_ENDS: Edges = {
    "object-end": (("first", "sentence-end"), ("second", "sentence-end"), ("first", "first-end")),
    "relation-end": (("relation", "sentence-end"),),
}
# The order of the words is in these two alone: first to relation, relation to second.
_DIRECTED: Edges = {
    "object-object": (("first", "first"), ("second", "second")),
    "object-relation": (("first", "relation"),),
    "relation-object": (("relation", "second"),),
    **_TO_ENDS,
}
_SYMMETRIC: Edges = {
    "object-object": (("first", "first"), ("second", "second")),
    "object-relation": (("first", "relation"), ("second", "relation")),
    "relation-object": (("relation", "first"), ("relation", "second")),
    **_TO_ENDS,
}


@dataclass(frozen=True)
class RelationGraph:
    """A directed graph whose nodes and edges are of several kinds.

    Attributes:
        kinds: the kind of each node, in the order in which nodes are stored.
        edges: for each type of `EDGE_TYPES`, pairs of the numbers of source and destination.

    Raises:
        ValueError: an edge between nodes of the wrong kinds, or given twice.
    """

    kinds: tuple[str, ...]
    edges: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        for (name, ends), pairs in zip(EDGE_TYPES.items(), self.edges, strict=True):
            for source, destination in pairs:
                found = (self.kinds[source], self.kinds[destination])
                if found != ends:
                    raise ValueError(
                        f"an edge {name} goes from {ends[0]} to {ends[1]}, got one from "
                        f"{found[0]} to {found[1]}"
                    )
            if len(set(pairs)) < len(pairs):
                raise ValueError(f"an edge {name} is given twice: give each once")

    def adjacency(self, device: torch.device | None = None) -> Bool[Tensor, "types n n"]:
        """Whether an edge of a type leads to a node (second axis) from a node (third axis)."""
        return _masks(self)[0].to(device)

    def receivers(self, device: torch.device | None = None) -> Bool[Tensor, "types n"]:
        """Whether a node is of the kind that edges of a type lead to."""
        return _masks(self)[1].to(device)


GraphBuilder = Callable[[tuple[str, ...]], RelationGraph]


def directed_relation(roles: Sequence[str] = ROLES) -> RelationGraph:
    """The graph of an ordered relation: the first object acts through the relation on the second.

    Objects keep themselves; the first tells the relation and the relation the second; all three
    tell the end of their sentence, and the first object the end of the sentence about it alone.
    What A does to B and what B does to A differ in two edges.

    Args:
        roles: the role of each node, in the order in which nodes are stored.

    Raises:
        ValueError: a role that is unknown, missing or given twice.

    Example:
        >>> graph = directed_relation()
        >>> graph.kinds, graph.edges[1]
        (('object', 'relation', 'object', 'end', 'end'), ((0, 1),))

    Source: arXiv 2403.20249, section 4.2.
    """
    return _build(_DIRECTED, roles)


def symmetric_relation(roles: Sequence[str] = ROLES) -> RelationGraph:
    """The same graph without a direction: each object tells the relation, and is told by it.

    It cannot know which object came first, and is there to compare with.

    Args:
        roles: the role of each node, in the order in which nodes are stored.

    Raises:
        ValueError: a role that is unknown, missing or given twice.
    """
    return _build(_SYMMETRIC, roles)


GRAPHS: Mapping[str, GraphBuilder] = {
    "directed": directed_relation,
    "symmetric": symmetric_relation,
}


def _build(edges: Edges, roles: Sequence[str]) -> RelationGraph:
    for role in roles:
        if role not in KINDS:
            raise unknown("role", role, KINDS)
    if Counter(roles) != Counter(ROLES):
        raise ValueError(f"each of the roles {', '.join(ROLES)} is needed once, got {list(roles)}")
    place = {role: number for number, role in enumerate(roles)}
    numbered = (tuple((place[a], place[b]) for a, b in edges[name]) for name in EDGE_TYPES)
    return RelationGraph(tuple(KINDS[role] for role in roles), tuple(numbered))


@lru_cache(maxsize=64)
def _masks(graph: RelationGraph) -> tuple[Tensor, Tensor]:
    count = len(graph.kinds)
    adjacency = torch.zeros(len(graph.edges), count, count, dtype=torch.bool)
    for number, pairs in enumerate(graph.edges):
        if pairs:
            source, destination = torch.tensor(pairs).T
            adjacency[number, destination, source] = True
    wanted = [[kind == end for kind in graph.kinds] for _, end in EDGE_TYPES.values()]
    return adjacency, torch.tensor(wanted)
