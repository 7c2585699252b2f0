"""Attention over the graph of a relation: a loop over edges, and what order and types do to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.guidance.relations import WIDTH, rectifier
from tests.oracles.relational_attention import graph_attention, relational_attention

from rectiflow.guidance import (
    GraphAttention,
    RelationalGraphAttention,
    RelationGraph,
    directed_relation,
    symmetric_relation,
)
from rectiflow.guidance.relation_graph import EDGE_TYPES, ROLES

ARRIVING = [end for _, end in EDGE_TYPES.values()]
GRAPHS = pytest.mark.parametrize("build", [directed_relation, symmetric_relation])


def nodes(*lead: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 5, WIDTH, generator=generator, dtype=torch.float64)


def network(seed: int = 1) -> RelationalGraphAttention:
    return rectifier(seed).net.double()


@GRAPHS
def test_equals_a_loop_over_edges(build) -> None:
    net, x = network(), nodes()
    layer = graph_attention(net.first, x, build(), ARRIVING)
    # Double precision, sums of a few terms in another order.
    torch.testing.assert_close(net.first(x, build()), layer, rtol=1e-12, atol=1e-12)
    whole = relational_attention(net, x, build(), ARRIVING)
    torch.testing.assert_close(net(x, build()), whole, rtol=1e-12, atol=1e-12)


def test_equals_the_loop_with_more_nodes_and_crowded_edges() -> None:
    kinds = ("object", "end", "object", "relation", "object")
    edges = (((0, 2), (2, 0), (4, 0), (0, 0)), ((0, 3), (4, 3)), (), ((4, 1), (2, 1), (0, 1)), ())
    graph, net, x = RelationGraph(kinds, edges), network(), nodes()
    torch.testing.assert_close(
        net(x, graph), relational_attention(net, x, graph, ARRIVING), rtol=1e-12, atol=1e-12
    )


def test_a_batch_is_its_graphs_one_by_one() -> None:
    net, x = network(), nodes(2, 3)
    each = torch.stack([torch.stack([net(one, directed_relation()) for one in row]) for row in x])
    torch.testing.assert_close(net(x, directed_relation()), each, rtol=1e-12, atol=1e-12)


def test_a_node_without_edges_of_a_type_gets_exactly_its_bias() -> None:
    layer = rectifier().net.first
    no_edges = RelationGraph(directed_relation().kinds, ((),) * len(EDGE_TYPES))
    found = layer(nodes().float(), no_edges)
    for number, kind in enumerate(no_edges.kinds):
        bias = sum(layer.bias[i] for i, end in enumerate(ARRIVING) if end == kind)
        assert torch.equal(found[number], torch.as_tensor(bias))
    # The end of the sentence about A alone hears nothing from the relation but its bias.
    silent = layer.bias[list(EDGE_TYPES).index("relation-end")]
    with torch.no_grad():
        before = layer(nodes().float(), directed_relation())
        silent += 1.0
        after = layer(nodes().float(), directed_relation())
    torch.testing.assert_close(after[3] - before[3], torch.ones_like(before[3]))
    assert torch.equal(after[:3], before[:3])


def test_one_incoming_edge_has_weight_one_whatever_the_end_says() -> None:
    layer, x = network().first, nodes()
    other = x.clone()
    other[3] += 5.0
    assert torch.equal(layer(x, directed_relation())[3], layer(other, directed_relation())[3])
    # Where two edges meet, a vector at their end matters only as far as it bends their scores.
    others = x.repeat(50, 1, 1)
    others[:, 4] = 3 * nodes(50)[:, 4]
    found = layer(others, directed_relation())[:, 4]
    assert (found - found[:1]).abs().max() > 1e-3


def test_the_order_is_in_two_types_of_edges() -> None:
    one, other = directed_relation(), directed_relation(("second", "relation", "first", *ROLES[3:]))
    differ = [name for name, a, b in zip(EDGE_TYPES, one.edges, other.edges) if set(a) != set(b)]
    assert differ == ["object-relation", "relation-object", "object-end"]
    # The last differs in the sentence about the first object alone.
    ends = [set(graph.edges[3]) for graph in (one, other)]
    assert ends[0] ^ ends[1] == {(0, 3), (2, 3)}


@GRAPHS
def test_exchanging_the_objects_changes_the_sentence_only_if_edges_have_a_direction(build) -> None:
    net, x = rectifier(graph=build).double(), nodes()
    swapped = x[[2, 1, 0, 3, 4]]
    same = torch.allclose(net(x)[1], net(swapped)[1], rtol=1e-12, atol=1e-12)
    assert same == (build is symmetric_relation)


@GRAPHS
def test_nodes_may_be_stored_in_any_order(build) -> None:
    made, x = rectifier(graph=build).double(), nodes(2)
    wanted = made(x)
    for order in itertools.islice(itertools.permutations(range(5)), 1, 120, 7):
        found = made(x[:, list(order)], [ROLES[place] for place in order])
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_exact() -> None:
    layer = GraphAttention(3, 2, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, directed_relation()), (x,))


def test_half_precision_and_large_scores_stay_finite() -> None:
    net = rectifier().net.bfloat16()
    assert net(100 * nodes().bfloat16(), directed_relation()).isfinite().all()


def test_size_is_that_of_the_paper() -> None:
    net = RelationalGraphAttention(1024)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(16e6, rel=0.02)


def test_wrong_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown role 'frist': did you mean 'first'"):
        directed_relation(("frist", *ROLES[1:]))
    with pytest.raises(ValueError, match="is needed once"):
        directed_relation(("first", "first", *ROLES[2:]))
    kinds, nothing = directed_relation().kinds, ((),) * 4
    with pytest.raises(ValueError, match="an edge object-object goes from object to object"):
        RelationGraph(kinds, (((0, 1),), *nothing))
    with pytest.raises(ValueError, match="given twice"):
        RelationGraph(kinds, (((0, 2), (0, 2)), *nothing))
    with pytest.raises(ValueError, match="heads must be > 0"):
        RelationalGraphAttention(4, heads=0)
