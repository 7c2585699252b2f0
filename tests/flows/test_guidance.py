"""Classifier-free and skip-layer guidance: limits, one stacked call, every view, composition."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.distill import generate_pairs
from rectiflow.distill.generation import describe_field
from rectiflow.flows import (
    ClassifierFreeGuidance,
    Field,
    FlowModel,
    LivePairs,
    SkipLayers,
    integrate,
)
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.path_registry import PATHS, build

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
    found = ClassifierFreeGuidance(FlowModel(net), 2.5).velocity(X, T, label=LABEL)
    null = said(torch.full_like(LABEL, 7))
    torch.testing.assert_close(found, null + 2.5 * (said(LABEL) - null))
    assert net.calls == [6]


@pytest.mark.parametrize("scale, label", [(1.0, LABEL), (0.0, torch.full_like(LABEL, 7))])
def test_scales_one_and_zero_are_one_branch(scale, label):
    net = Net()
    found = ClassifierFreeGuidance(FlowModel(net), scale).velocity(X, T, label=LABEL)
    assert torch.equal(found, said(label))
    assert net.calls == [3]


def test_without_a_condition_there_is_nothing_to_guide():
    field = ClassifierFreeGuidance(FlowModel(lambda x, t: 2 * x), 3.0)
    assert torch.equal(field.velocity(X, T), 2 * X)


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_views_of_a_guided_field_agree(path, prediction):
    net, t = Net(), torch.full((3,), 0.4, dtype=torch.float64)
    field = ClassifierFreeGuidance(FlowModel(net, build(path), prediction), 3.0)
    assert isinstance(field, Field)
    x = X.double()
    views = {"velocity": field.velocity, "data": field.denoise, "noise": field.noise}
    given = views[prediction](x, t, label=LABEL)
    for wanted, view in views.items():
        expected = field.path.convert(given, x, t, given=prediction, wanted=wanted)
        # A combination with weights summing to one commutes with an affine map, up to rounding.
        torch.testing.assert_close(view(x, t, label=LABEL), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction, path", [("velocity", "rectified"), ("noise", "vp")])
def test_rescaling_is_that_of_diffusers_on_what_the_network_predicts(prediction, path):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    net = Net()
    model = FlowModel(net, build(path), prediction)
    guided = ClassifierFreeGuidance(model, 6.0, rescale=0.7)
    x, t = X.double(), T.double()
    conditional, null = net(x, t, label=LABEL), net(x, t, label=torch.full_like(LABEL, 7))
    wanted = rescale_noise_cfg(torch.lerp(null, conditional, 6.0), conditional, 0.7)
    wanted = model.path.convert(wanted, x, t, given=prediction, wanted="velocity")
    torch.testing.assert_close(guided.velocity(x, t, label=LABEL), wanted, rtol=1e-9, atol=1e-9)


def test_whole_rescaling_keeps_the_spread_and_leaves_rows_outside_alone():
    guided = ClassifierFreeGuidance(FlowModel(Net()), 6.0, rescale=1.0, stop=0.6)
    found = guided.velocity(X, T, label=LABEL)
    torch.testing.assert_close(found.std(1), said(LABEL).std(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2], said(LABEL)[2])
    assert not torch.allclose(found[0], said(LABEL)[0])


def test_skipping_layers_pushes_away_from_the_weaker_net_between_two_times():
    net = Net()
    field = SkipLayers(FlowModel(net), [3, 4], scale=2.5, guidance=4.0, start=0.2, stop=0.8)
    found = field.velocity(X, T, label=LABEL)
    guided = ClassifierFreeGuidance(FlowModel(Net()), 4.0).velocity(X, T, label=LABEL)
    expected = guided + 2.5 * torch.tensor([[0.0], [2.0], [0.0]])
    torch.testing.assert_close(found, expected)
    assert net.calls == [6, 3], "three evaluations, not four"


def test_skipping_with_guidance_needs_a_condition():
    with pytest.raises(ValueError, match="needs a condition to guide toward"):
        integrate(SkipLayers(FlowModel(Net()), (0,), guidance=4.0), X, 2)


def test_no_layers_or_times_outside_cost_and_change_nothing():
    for settings in ({"layers": ()}, {"start": 0.95, "stop": 1.0}, {"scale": 0.0}):
        net = Net()
        field = SkipLayers(FlowModel(net), **{"layers": (0,), "guidance": 4.0, **settings})
        guided = ClassifierFreeGuidance(FlowModel(Net()), 4.0)
        assert torch.equal(field.velocity(X, T, label=LABEL), guided.velocity(X, T, label=LABEL))
        assert net.calls == [6]


def test_skipping_without_guidance_of_the_null_needs_the_conditional_branch():
    field = SkipLayers(FlowModel(Net()), (0,), scale=1.0, guidance=0.0, start=0.0, stop=1.0)
    null = said(torch.full_like(LABEL, 7))
    torch.testing.assert_close(field.velocity(X, T, label=LABEL), null + 1)


def test_one_call_or_two_say_the_same():
    net = Net()
    two = ClassifierFreeGuidance(FlowModel(net), 2.5, batched=False)
    found = two.velocity(X, T, label=LABEL)
    assert net.calls == [3, 3]
    one = ClassifierFreeGuidance(FlowModel(Net()), 2.5)
    assert torch.equal(found, one.velocity(X, T, label=LABEL))


def test_values_without_rows_that_differ_take_two_calls():
    class Styled(Net):
        def forward(self, x, t, *, label, style):
            return super().forward(x, t, label=label) + len(style)

        def null_condition(self, *, label, style):
            return {"label": torch.full_like(label, 7), "style": ""}

    net = Styled()
    found = ClassifierFreeGuidance(FlowModel(net), 2.0).velocity(X, T, label=LABEL, style="ink")
    null = said(torch.full_like(LABEL, 7))
    torch.testing.assert_close(found, null + 2.0 * (said(LABEL) + 3 - null))
    assert net.calls == [3, 3]


def test_the_interval_is_closed_and_costs_one_call_outside():
    net = Net()
    field = ClassifierFreeGuidance(FlowModel(net), 3.0, start=0.1, stop=0.5)
    whole = ClassifierFreeGuidance(FlowModel(Net()), 3.0).velocity(X, T, label=LABEL)
    found = field.velocity(X, T, label=LABEL)
    torch.testing.assert_close(found[:2], whole[:2])
    assert torch.equal(found[2], said(LABEL)[2])
    assert torch.equal(field.velocity(X, T * 0 + 0.7, label=LABEL)[2], X[2] + 0.7 + 20)
    assert net.calls == [6, 3]


def test_the_interval_needs_no_look_at_the_time():
    """Compiled in one piece: nothing is read back, as on a device that must not be awaited."""
    field = ClassifierFreeGuidance(FlowModel(Net()), 3.0, start=0.2, stop=0.5)
    compiled = torch.compile(
        lambda x, t: field.velocity(x, t, label=LABEL), backend="eager", fullgraph=True
    )
    for t in (T, T * 0 + 0.7):
        torch.testing.assert_close(compiled(X, t), field.velocity(X, t, label=LABEL))


@pytest.mark.parametrize("negative", [5, torch.tensor(5), torch.tensor([5]), torch.full((3,), 5)])
def test_a_negative_condition_takes_the_place_of_the_null(negative):
    field = ClassifierFreeGuidance(FlowModel(Net()), 3.0, negative={"label": negative})
    away = said(torch.full_like(LABEL, 5))
    found = field.velocity(X, T, label=LABEL)
    torch.testing.assert_close(found, away + 3 * (said(LABEL) - away))


def test_a_negative_condition_makes_do_without_a_null():
    model = FlowModel(lambda x, t, label: x + label[:, None])
    field = ClassifierFreeGuidance(model, 2.0, negative={"label": 1})
    torch.testing.assert_close(field.velocity(X, T, label=LABEL), X + 2 * LABEL[:, None] - 1)


def test_records_tell_negatives_apart():
    model = FlowModel(Net())
    told = [
        describe_field(ClassifierFreeGuidance(model, 3.0, negative={"label": value}))
        for value in (1, 2, torch.tensor([1]), torch.tensor([2]))
    ]
    assert len(set(told)) == 4
    assert told[0] == "ClassifierFree(scale=3.0, negative={label:1})"
    two = ClassifierFreeGuidance(model, 3.0, batched=False, stop=0.5)
    assert describe_field(two) == "ClassifierFree(scale=3.0, stop=0.5)"


def test_a_guided_field_is_a_teacher(tmp_path):
    model = FlowModel(Net(), shape=(2,))
    guided, labels = (
        ClassifierFreeGuidance(model, 3.0),
        TensorData(torch.zeros(3, 2), {"label": LABEL}),
    )
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
        ClassifierFreeGuidance(FlowModel(Net()), -1.0)
    for scale, message in ((math.nan, "scale must be >= 0"), (math.inf, "scale must be finite")):
        with pytest.raises(ValueError, match=message):
            ClassifierFreeGuidance(FlowModel(Net()), scale)
    with pytest.raises(ValueError, match=r"needs 0 <= start < stop <= 1, got 0\.5 to 0\.1"):
        ClassifierFreeGuidance(FlowModel(Net()), 2.0, start=0.5, stop=0.1)
    with pytest.raises(ValueError, match="gives 'lable', but samples are conditioned on label"):
        ClassifierFreeGuidance(FlowModel(Net()), 2.0, negative={"lable": 1}).velocity(
            X, T, label=LABEL
        )
    with pytest.raises(ValueError, match=r"must have the shape \(3,\)"):
        ClassifierFreeGuidance(
            FlowModel(Net()), 2.0, negative={"label": torch.tensor([1, 2])}
        ).velocity(X, T, label=LABEL)
    with pytest.raises(ValueError, match="needs a condition to guide toward, got none"):
        integrate(ClassifierFreeGuidance(FlowModel(Net()), 2.0), X, 2)
    with pytest.raises(ValueError, match="layers must be >= 0"):
        SkipLayers(FlowModel(Net()), (-1,))
    with pytest.raises(ValueError, match="start <= stop"):
        SkipLayers(FlowModel(Net()), (0,), start=0.5, stop=0.1)
    with pytest.raises(ValueError, match="no null condition for label"):
        ClassifierFreeGuidance(FlowModel(lambda x, t, label: x), 2.0).velocity(X, T, label=LABEL)
