import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from rectiflow.flows import FlowModel, GaussianField, InvertedPairs, fields, integrate
from rectiflow.flows.couplings import (
    Draw,
    Independent,
    LivePairs,
    MinibatchOT,
    Pairs,
    TensorData,
    as_data,
    batches,
)
from rectiflow.flows.fields import evaluating


def labelled(count=30, shape=(2,)):
    values = torch.randn(count, *shape, generator=torch.Generator().manual_seed(9))
    return TensorData(values, {"label": torch.arange(count) % 3})


def teacher():
    return FlowModel(lambda x, t, label=None: torch.cos(x), shape=(2,))


def whole(pairs):
    return torch.cat(
        [pairs.source, pairs.target, *[v[:, None] for v in pairs.condition.values()]], 1
    )


@pytest.mark.parametrize(
    "coupling",
    [
        Independent(labelled()),
        Independent(torch.arange(14.0).reshape(7, 2), source=torch.randn(5, 2)),
        LivePairs(teacher(), steps=2, labels=labelled()),
    ],
    ids=["noise", "two data sets", "live"],
)
@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 12), cut=st.integers(0, 12), step=st.integers(0, 9), seed=st.integers(0, 99)
)
def test_parts_make_the_whole(coupling, size, cut, step, seed):
    cut = min(cut, size)
    together = whole(coupling.draw(Draw.of(size, step=step, seed=seed)))
    parts = [
        whole(coupling.draw(Draw.of(size, step=step, seed=seed, part=part)))
        for part in (slice(0, cut), slice(cut, size))
    ]
    torch.testing.assert_close(torch.cat(parts), together)


def test_numbers_of_a_part_are_those_of_the_whole():
    for draw_of in (lambda d: d.normal((2,)), lambda d: d.uniform()):
        together = draw_of(Draw.of(6, step=3))
        apart = [draw_of(Draw.of(6, step=3, part=slice(i, i + 2))) for i in (0, 2, 4)]
        assert torch.equal(torch.cat(apart), together)
        assert not torch.equal(together, draw_of(Draw.of(6, step=4)))
        assert not torch.equal(together, draw_of(Draw.of(6, step=3, seed=1)))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 9), seed=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(count, size, seed):
    steps = -(-2 * count // size)
    drawn = torch.cat([Draw.of(size, step=s, seed=seed).indices(count) for s in range(steps)])
    for epoch in (0, 1):
        rows = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(rows.tolist()) == list(range(count))


def test_orders_differ_by_epoch_stream_and_seed():
    orders = [
        Draw.of(50, step=0).indices(50),
        Draw.of(50, step=1).indices(50),
        Draw.of(50, step=0).indices(50, stream=1),
        Draw.of(50, step=0, seed=1).indices(50),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_an_empty_part_has_no_rows():
    assert Draw.of(4, part=slice(4, 4)).indices(10).shape == (0,)


def test_independent_pairs_keep_data_and_condition_together():
    data = labelled()
    pairs = Independent(data).draw(Draw.of(10, step=2))
    rows = Draw.of(10, step=2).indices(30)
    assert torch.equal(pairs.target, data.values[rows])
    assert torch.equal(pairs.condition["label"], rows % 3)
    other = Independent(data, source=labelled(20)).draw(Draw.of(10))
    assert torch.equal(other.source, labelled(20).values[Draw.of(10).indices(20, stream=1)])


def fixed(condition):
    generator = torch.Generator().manual_seed(4)
    pairs = Pairs(*torch.randn(2, 24, 3, generator=generator), condition)

    class Fixed:
        def draw(self, draw):
            return pairs

    return Fixed(), pairs


def test_minibatch_transport_costs_what_scipy_finds():
    coupling, before = fixed({})
    after = MinibatchOT(coupling).draw(Draw.of(24))
    cost = torch.cdist(before.source, before.target).square()
    rows, columns = linear_sum_assignment(cost)
    found = (after.source - after.target).square().sum(1).mean()
    torch.testing.assert_close(found, cost[rows, columns].mean())
    assert torch.equal(after.target, before.target)


def test_minibatch_transport_exchanges_within_a_condition_only():
    label, side = torch.arange(24) % 3, torch.arange(24) % 2
    coupling, before = fixed({"label": label, "side": side})
    after = MinibatchOT(coupling).draw(Draw.of(24))
    moved = False
    for group in range(6):
        rows = (label * 2 + side) == group
        old, new = before.source[rows], after.source[rows]
        assert sorted(old.tolist()) == sorted(new.tolist())
        moved |= not torch.equal(old, new)
    assert moved
    assert after.condition is before.condition


@pytest.mark.parametrize(
    "value", [torch.rand(24), torch.zeros(24, 2).long(), "cat"], ids=["float", "matrix", "text"]
)
def test_minibatch_transport_refuses_conditions_that_are_no_labels(value):
    coupling, _ = fixed({"text": value})
    with pytest.raises(ValueError, match=r"discrete labels of shape .* but 'text' is not one"):
        MinibatchOT(coupling).draw(Draw.of(24))


def test_live_pairs_are_where_the_teacher_carries_noise():
    model = teacher()
    model.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.9))
    model.net.forward = lambda x, t: model.net[1](model.net[0](x))
    pairs = LivePairs(model, steps=4, solver="heun").draw(Draw.of(6, seed=3))
    assert torch.equal(pairs.source, Draw.of(6, seed=3).normal((2,)))
    with torch.no_grad():
        wanted = integrate(model.eval(), pairs.source, 4, "heun")
    assert torch.equal(pairs.target, wanted)
    assert not pairs.target.requires_grad


def test_live_pairs_take_labels_and_a_guided_field():
    seen = []

    def guided(x, t, label):
        seen.append(label)
        return torch.ones_like(x)

    coupling = LivePairs(teacher(), steps=2, labels=labelled(), guided=guided)
    pairs = coupling.draw(Draw.of(5))
    torch.testing.assert_close(pairs.target, pairs.source + 1)
    assert all(torch.equal(label, pairs.condition["label"]) for label in seen)
    assert torch.equal(pairs.condition["label"], Draw.of(5).indices(30) % 3)
    with pytest.raises(ValueError, match="does not know its sample shape"):
        LivePairs(FlowModel(lambda x, t: x)).draw(Draw.of(2))


def test_invariant_9_reflow_of_a_straight_coupling_changes_nothing():
    # A 1-D Gaussian flow is straight after one reflow; its map is z -> m + s z.
    first = GaussianField(torch.tensor([0.7]).double(), torch.tensor([2.5]).double())
    source = torch.linspace(-3, 3, 41, dtype=torch.float64).unsqueeze(1)
    target = integrate(first, source, 50, "rk4")

    def reflowed(x, t):
        """The exact least-squares velocity on the pairs, which is affine in x."""
        state = (1 - t[0]) * source + t[0] * target
        design = torch.cat([torch.ones_like(state), state], 1)
        weights = torch.linalg.lstsq(design, target - source).solution
        return weights[0] + weights[1] * x

    for steps in (1, 7):
        torch.testing.assert_close(integrate(reflowed, source, steps), target, rtol=0, atol=1e-7)


def test_data_are_checked_and_wrapped():
    with pytest.raises(ValueError, match="condition 'label' has 2 rows for 3 samples"):
        TensorData(torch.zeros(3, 1), {"label": torch.zeros(2)})
    data = labelled()
    assert as_data(data) is data
    assert len(as_data(data.values)) == 30


def test_batches_are_the_steps_in_order():
    stream = batches(Independent(labelled()), 4, seed=5)
    for step in range(3):
        wanted = Independent(labelled()).draw(Draw.of(4, step=step, seed=5))
        assert torch.equal(whole(next(stream)), whole(wanted))


def test_teachers_follow_a_training_to_its_device():
    moved = []

    class Elsewhere(torch.nn.Linear):
        def to(self, *args, **kwargs):
            moved.append(args[0])
            return self

    teacher = Elsewhere(2, 2)
    with evaluating(teacher, torch.device("meta")):
        assert not teacher.training
    with evaluating(teacher, torch.device("cpu")), evaluating(teacher):
        pass
    assert moved == [torch.device("meta")]


@pytest.mark.parametrize("make", [LivePairs, lambda t: InvertedPairs(t, torch.zeros(4, 2))])
def test_pairs_bring_their_teacher_to_the_draw(monkeypatch, make):
    moved = []
    teacher = FlowModel(lambda x, t: -x, shape=(2,))
    monkeypatch.setattr(FlowModel, "to", lambda self, device: moved.append(device))
    monkeypatch.setattr(fields, "device_of", lambda model: torch.device("meta"))
    make(teacher).draw(Draw.of(2))
    assert moved == [torch.device("cpu")]
