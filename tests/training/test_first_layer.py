"""TrAct in the trainer: the layer it takes, the steps it makes, what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rectiflow.flows import FlowModel, Independent
from rectiflow.flows.couplings import Draw
from rectiflow.nets import build
from rectiflow.optim import TrActConv2d, TrActLinear, apply_tract
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings
from rectiflow.training.first_layer import train_first_layer

DATA = 3 * torch.randn(60, 2, generator=torch.Generator().manual_seed(5)) + 1
SGD = OptimizerSettings("sgd", learning_rate=0.1, clip_norm=0.0)


def make_method(dropout: float = 0.0) -> FlowMatching:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build("mlp", shape=(2,), width=8, depth=1, dropout=dropout, zero=False)
    return FlowMatching(FlowModel(net, shape=(2,)), Independent(DATA))


def train(steps: int, folder: Path | None = None, resume: bool = False, **changes) -> FlowModel:
    options = {"batch_size": 12, "checkpoint_every": 1, "ema": 0.0, "optim": SGD, "tract": 0.2}
    settings = TrainerSettings(steps=steps, **{**options, **changes})
    return Trainer(make_method(), settings, folder=folder).fit(resume=resume)


def weights(model: FlowModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_first_step_is_that_of_the_rectified_layer():
    method = make_method()
    path = apply_tract(
        method.model.net, 0.2, relative=True, example=(torch.zeros(2, 2), torch.zeros(2))
    )
    optimizer = torch.optim.SGD(method.model.parameters(), 0.1, momentum=0.9)
    method.loss(Draw.of(12)).backward()
    optimizer.step()
    trained, plain = weights(train(1)), weights(train(1, tract=None))
    moved = []
    for name, value in weights(method.model).items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-7)
        if not torch.allclose(trained[name], plain[name], rtol=1e-4):
            moved.append(name)
    assert moved == [f"net.{path}.weight"]


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    adam = {"optim": OptimizerSettings(), "ema": 0.9}
    expected = weights(train(6, tmp_path / "whole", **adam))
    train(3, tmp_path / "cut", **adam)
    resumed = weights(train(6, tmp_path / "cut", resume=True, **adam))
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_trained_models_are_plain(ema):
    model = train(1, ema=ema)
    assert any(type(module) is nn.Linear for module in model.modules())
    assert not any(isinstance(module, TrActLinear) for module in model.modules())


def test_layers_of_images_and_what_looking_changes():
    net = build("unet", shape=(1, 8, 8), width=8, multipliers=(1, 2), blocks=1, attention=())
    method = FlowMatching(FlowModel(net, shape=(1, 8, 8)), Independent(torch.randn(4, 1, 8, 8)))
    state = torch.random.get_rng_state()
    path = train_first_layer(method, method.phases(), 0.3, Draw.of(2), gram="allreduce")
    assert torch.equal(torch.random.get_rng_state(), state)
    layer = net.get_submodule(path)
    assert type(layer) is TrActConv2d
    assert layer.in_channels == 1
    assert (layer.tract.lam, layer.tract.relative, layer.tract.gram) == (0.3, True, "allreduce")
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_another_layer_may_be_named():
    layers = [n for n, m in make_method().model.net.named_modules() if type(m) is nn.Linear]
    trained, first = weights(train(1, tract_layer=layers[-1])), weights(train(1))
    plain = weights(train(1, tract=None))
    moved = [name for name in plain if not torch.allclose(trained[name], plain[name], rtol=1e-4)]
    assert moved == [f"net.{layers[-1]}.weight"]
    assert torch.equal(first[moved[0]], plain[moved[0]])


@pytest.mark.parametrize("gram", [None, "local", "allreduce"])
def test_whose_inputs_are_looked_at_may_be_said(gram):
    method = make_method()
    Trainer(method, TrainerSettings(tract=0.1, tract_gram=gram))
    (layer,) = (m for m in method.model.net.modules() if isinstance(m, TrActLinear))
    assert layer.tract.gram == (gram or "local")


def test_modules_are_on_their_device_before_the_layer_is_looked_for(monkeypatch):
    """The loss that shows the layer may use more than the model."""
    events = []

    class Both(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.judge = net, nn.Linear(2, 2)

        def to(self, *place, **options):
            events.append("moved")
            return super().to(*place, **options)

    class Judged(FlowMatching):
        def phases(self):
            return [replace(phase, module=Both(phase.module)) for phase in super().phases()]

    looked = lambda *given, **options: events.append("looked")  # noqa: E731
    monkeypatch.setattr("rectiflow.training.trainer.train_first_layer", looked)
    method = make_method()
    Trainer(Judged(method.model, method.coupling), TrainerSettings(tract=0.1))
    assert events[:2] == ["moved", "looked"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="--tract-layer says how --tract trains a layer"):
        TrainerSettings(tract_layer="body.0")
    with pytest.raises(ValueError, match="--tract-gram says how --tract trains a layer"):
        TrainerSettings(tract_gram="local")
    with pytest.raises(ValueError, match="unknown tract_gram 'all'"):
        TrainerSettings(tract=0.1, tract_gram="all")
    with pytest.raises(ValueError, match="unknown layer 'bodi'"):
        train(1, tract_layer="bodi")
    with pytest.raises(ValueError, match="tract must be > 0"):
        TrainerSettings(tract=0.0)
    with pytest.raises(ValueError, match="sophiah reads curvature off gradients"):
        TrainerSettings(tract=0.1, optim=OptimizerSettings("sophiah"))
    method = make_method()
    path = train_first_layer(method, method.phases(), 0.1, Draw.of(2))
    method = make_method()
    method.model.net.get_submodule(path).weight.requires_grad_(False)
    with pytest.raises(ValueError, match=f"weights of '{path}' are frozen"):
        train_first_layer(method, method.phases(), 0.1, Draw.of(2))
    with pytest.raises(ValueError, match="this model trains none"):
        train_first_layer(method, [], 0.1, Draw.of(2))
