import pytest
import torch
from torch import nn

from rectiflow.flows import (
    ClassifierFreeGuidance,
    Counted,
    Field,
    FlowModel,
    integrate,
    sample,
)
from rectiflow.flows.fields import evaluating
from rectiflow.flows.metrics import straightness
from rectiflow.flows.path_registry import PATHS, build
from rectiflow.flows.paths import PREDICTIONS
from rectiflow.guidance import APG
from rectiflow.nets import build as build_net


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_gives_every_view_whatever_its_net_predicts(name, prediction):
    path = build(name)
    source, target = torch.randn(
        2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    truth = path.target_of(prediction, source, target, t)
    model, x = FlowModel(lambda x, t: truth, path, prediction), path.interpolate(source, target, t)
    assert isinstance(model, Field)
    views = {
        "velocity": model.velocity,
        "data": model.denoise,
        "noise": model.noise,
        "score": model.score,
    }
    for kind, view in views.items():
        wanted = path.target_of(kind, source, target, t)
        torch.testing.assert_close(view(x, t), wanted, rtol=1e-9, atol=1e-9)
    assert model(x, t) is truth


def test_conditions_reach_the_net():
    model = FlowModel(lambda x, t, *, label: x * label[:, None])
    x, t, label = torch.ones(2, 1), torch.zeros(2), torch.tensor([2.0, 3.0])
    for view in (model.velocity, model.denoise, model.noise, model.score):
        with pytest.raises(TypeError):
            view(x, t)
        assert view(x, t, label=label).shape == (2, 1)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="unknown prediction 'velocty': did you mean 'velocity'"):
        FlowModel(nn.Identity(), prediction="velocty")


def test_null_condition_comes_from_the_net():
    class Net(nn.Module):
        def null_condition(self, *, label):
            return {"label": torch.full_like(label, 10)}

    model = FlowModel(Net())
    assert model.null_condition(label=torch.tensor([3]))["label"].tolist() == [10]
    plain = FlowModel(nn.Identity())
    assert plain.null_condition() == {}
    with pytest.raises(ValueError, match="Identity has no null condition for label"):
        plain.null_condition(label=torch.tensor([3]))


def test_check_names_the_shape_it_wants():
    with pytest.raises(ValueError, match=r"shape \(batch, 1, 8, 8\), got \(2, 64\)"):
        FlowModel(nn.Identity(), shape=(1, 8, 8)).check(torch.zeros(2, 64))


def test_evaluating_leaves_modes_as_they_were():
    net = nn.Sequential(nn.Dropout(), nn.Dropout().eval(), nn.Linear(1, 1))
    before = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluating(net):
        net(torch.tensor([[float(module.training) for module in net.modules()]]))
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before


def test_evaluating_reaches_the_model_inside_guidance():
    net = nn.Sequential(nn.Dropout())
    guided = ClassifierFreeGuidance(Counted(FlowModel(net)), 2.0)
    with evaluating(guided):
        assert not net[0].training
    assert net[0].training


def test_counted_counts_and_passes_on():
    model = FlowModel(lambda x, t, scale: x * scale)
    counted = Counted(model)
    for _ in range(3):
        found = counted(torch.ones(1, 1), torch.zeros(1), scale=2)
    assert counted.evaluations == 3
    assert found.item() == 2


def test_counted_fields_are_what_is_inside():
    model = FlowModel(lambda x, t, label=None: -x, build("edm"), shape=(2,))
    counted = Counted(model)
    assert counted.path is model.path
    z = torch.randn(4, 2)
    assert straightness(counted, z, 4).total == straightness(model, z, 4).total
    with pytest.raises(ValueError, match=r"shape \(batch, 2\)"):
        integrate(counted, torch.ones(1, 3), 2)
    assert not hasattr(Counted(lambda x, t: x), "path")


def test_counted_fields_remember_as_what_is_inside():
    net = build_net("mlp", shape=(2,), width=8, depth=1, classes=2, zero=False)
    guided = APG(FlowModel(net, shape=(2,)), 3.0, momentum=-0.5)
    counted, label, z = Counted(guided), torch.tensor([0, 1]), torch.ones(2, 2)
    expected = integrate(guided, z, 4, label=label)
    assert torch.equal(integrate(counted, z, 4, label=label), expected)
    assert counted.evaluations == 4
    with pytest.raises(ValueError, match="dopri5 takes evaluations back"):
        integrate(counted, z, 4, "dopri5", label=label)


def test_sampling_that_is_told_in_part_is_completed():
    model = FlowModel(lambda x, t: -x, shape=(1,), sampling={"solver": "heun"})
    assert model.sampling == {"solver": "heun", "steps": 50}
    assert sample(model, 2).shape == (2, 1)
