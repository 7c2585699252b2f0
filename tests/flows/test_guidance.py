"""Classifier-free and skip-layer guidance: limits, one stacked call, every view, composition."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import generate_pairs
from rectiflow.distill.generation import describe_field
from rectiflow.flows import ClassifierFree, Field, FlowModel, LivePairs, SkipLayers, integrate
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.paths import PATHS, build

# Two rows in a batch or four differ by rounding in a matrix product, by nothing here.
X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 0.9])
LABEL = torch.tensor([0, 1, 2])


class Net(torch.nn.Module):
    """Says x + 10 label - skipped layers, and counts the rows it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x, t, *, label, skip_layers=()):
        self.calls.append(len(x))
        return x + t[:, None] + 10 * label[:, None] - len(skip_layers)

    def null_condition(self, *, label):
        return {"label": torch.full_like(label, 7)}


def said(label: torch.Tensor) -> torch.Tensor:
    return X + T[:, None] + 10 * label[:, None]


def test_guidance_is_the_formula_in_one_stacked_call():
    net = Net()
    found = ClassifierFree(FlowModel(net), 2.5).velocity(X, T, label=LABEL)
    null = said(torch.full_like(LABEL, 7))
    torch.testing.assert_close(found, null + 2.5 * (said(LABEL) - null))
    assert net.calls == [6]


@pytest.mark.parametrize("scale, label", [(1.0, LABEL), (0.0, torch.full_like(LABEL, 7))])
def test_scales_one_and_zero_are_one_branch(scale, label):
    net = Net()
    found = ClassifierFree(FlowModel(net), scale).velocity(X, T, label=LABEL)
    assert torch.equal(found, said(label))
    assert net.calls == [3]


def test_without_a_condition_there_is_nothing_to_guide():
    field = ClassifierFree(FlowModel(lambda x, t: 2 * x), 3.0)
    assert torch.equal(field.velocity(X, T), 2 * X)


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_views_of_a_guided_field_agree(path, prediction):
    net, t = Net(), torch.full((3,), 0.4, dtype=torch.float64)
    field = ClassifierFree(FlowModel(net, build(path), prediction), 3.0)
    assert isinstance(field, Field)
    x = X.double()
    views = {"velocity": field.velocity, "data": field.denoise, "noise": field.noise}
    given = views[prediction](x, t, label=LABEL)
    for wanted, view in views.items():
        expected = field.path.convert(given, x, t, given=prediction, wanted=wanted)
        # A combination with weights summing to one commutes with an affine map, up to rounding.
        torch.testing.assert_close(view(x, t, label=LABEL), expected, rtol=1e-9, atol=1e-9)


def test_skipping_layers_pushes_away_from_the_weaker_net_between_two_times():
    net = Net()
    field = SkipLayers(FlowModel(net), [3, 4], scale=2.5, guidance=4.0, start=0.2, stop=0.8)
    found = field.velocity(X, T, label=LABEL)
    guided = ClassifierFree(FlowModel(Net()), 4.0).velocity(X, T, label=LABEL)
    expected = guided + 2.5 * torch.tensor([[0.0], [2.0], [0.0]])
    torch.testing.assert_close(found, expected)
    assert net.calls == [6, 3], "three evaluations, not four"


def test_no_layers_or_times_outside_cost_and_change_nothing():
    for settings in ({"layers": ()}, {"start": 0.95, "stop": 1.0}, {"scale": 0.0}):
        net = Net()
        field = SkipLayers(FlowModel(net), **{"layers": (0,), "guidance": 4.0, **settings})
        guided = ClassifierFree(FlowModel(Net()), 4.0)
        assert torch.equal(field.velocity(X, T, label=LABEL), guided.velocity(X, T, label=LABEL))
        assert net.calls == [6]


def test_skipping_without_guidance_of_the_null_needs_the_conditional_branch():
    field = SkipLayers(FlowModel(Net()), (0,), scale=1.0, guidance=0.0, start=0.0, stop=1.0)
    null = said(torch.full_like(LABEL, 7))
    torch.testing.assert_close(field.velocity(X, T, label=LABEL), null + 1)


def test_a_guided_field_is_a_teacher(tmp_path):
    model = FlowModel(Net(), shape=(2,))
    guided, labels = ClassifierFree(model, 3.0), TensorData(torch.zeros(3, 2), {"label": LABEL})
    pairs = LivePairs(model, steps=4, labels=labels, guided=guided).draw(Draw.of(3))
    expected = integrate(guided, pairs.source, 4, **pairs.condition)
    torch.testing.assert_close(pairs.target, expected)
    store = generate_pairs(
        model, tmp_path / "pairs", 3, steps=4, conditions=labels, field=guided, gate=None
    )
    assert store.settings.guidance == "ClassifierFree(scale=3.0)"
    source, target, condition = store.rows(torch.arange(3))
    torch.testing.assert_close(target, integrate(guided, source, 4, **condition))


def test_records_name_what_was_skipped():
    assert "layers=(7, 8)" in describe_field(SkipLayers(FlowModel(Net()), [7, 8]))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="scale must be >= 0"):
        ClassifierFree(FlowModel(Net()), -1.0)
    with pytest.raises(ValueError, match="layers must be >= 0"):
        SkipLayers(FlowModel(Net()), (-1,))
    with pytest.raises(ValueError, match="start <= stop"):
        SkipLayers(FlowModel(Net()), (0,), start=0.5, stop=0.1)
    with pytest.raises(ValueError, match="no null condition for label"):
        ClassifierFree(FlowModel(lambda x, t, label: x), 2.0).velocity(X, T, label=LABEL)
