"""Consistency distillation: its fixed point, its boundary, its moving copy."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import ConsistencyDistillation
from rectiflow.flows import (
    CosinePath,
    FlowModel,
    GaussianField,
    Independent,
    PairedGaussian,
    RectifiedPath,
    VariancePreservingPath,
    integrate,
    sample,
)
from rectiflow.flows.couplings import Draw
from rectiflow.guidance import APG
from rectiflow.nets import build
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 2.0], dtype=torch.float64)


def points(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator, dtype=dtype)


def model_of(path=None, prediction="velocity", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(2,), width=16, depth=1, zero=False, **options)
    return FlowModel(net, path or CosinePath(), prediction, shape=(2,))


@pytest.mark.parametrize(
    "path, prediction",
    [
        (CosinePath(), "velocity"),
        (VariancePreservingPath(), "noise"),
        (RectifiedPath(), "velocity"),
    ],
    ids=lambda p: getattr(p, "name", p),
)
def test_invariant_10_a_first_order_teacher_is_consistent(path, prediction):
    field = PairedGaussian(MEAN, STD, path)
    output = field.noise if prediction == "noise" else field.velocity
    teacher = FlowModel(output, path, prediction, shape=(2,))
    data = points(64, dtype=torch.float64)
    method = ConsistencyDistillation(teacher, Independent(data), steps=10)
    assert float(method.loss(Draw.of(64))) < 1e-12
    before = FlowModel(GaussianField(MEAN, STD, path).velocity, path, shape=(2,))
    other = ConsistencyDistillation(before, Independent(data), steps=10)
    assert float(other.loss(Draw.of(64))) > 1e-3


def test_loss_is_that_of_the_definition():
    path, data = CosinePath(), points(32)
    teacher, guided = model_of(), GaussianField(torch.zeros(2), torch.ones(2) * 2, CosinePath())
    method = ConsistencyDistillation(teacher, Independent(data), steps=4, guided=guided)
    with torch.no_grad():  # a copy that is not the student
        for p in method.target.parameters():
            p.mul_(1.1)
    draw = Draw.of(32)
    rows, noise = draw.indices(32), draw.normal((2,))
    index = (torch.rand(32, generator=draw.generator) * 4).long()
    losses = []
    for i in range(32):
        t, s = index[i : i + 1] / 4, (index[i : i + 1] + 1) / 4
        x = path.interpolate(noise[i : i + 1], data[rows[i : i + 1]], t)
        nearer = integrate(guided, x, [float(t), float(s)], "first-order")
        error = method.model.denoise(x, t) - method.target.denoise(nearer, s)
        losses.append(((error.square() + 1e-6).sqrt() - 1e-3).mean())
    torch.testing.assert_close(method.loss(Draw.of(32)), torch.stack(losses).mean())
    assert set(index.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("boundary, prediction", [("first-order", "v"), ("skip", "data")])
@pytest.mark.parametrize("path", [CosinePath(), VariancePreservingPath()], ids=lambda p: p.name)
def test_the_estimate_at_the_data_end_is_the_state(path, boundary, prediction):
    model = model_of(path, prediction)
    method = ConsistencyDistillation(model, Independent(points(8)), boundary=boundary)
    x = points(5, seed=3)
    with torch.no_grad():
        at_end = method.estimate(model, x, torch.ones(5))
        at_start = method.estimate(model, x, torch.zeros(5))
        data = model.denoise(x, torch.zeros(5))
    torch.testing.assert_close(at_end, x)
    # In noise the skip has no weight: (width alpha / sigma)² < 1e-6.
    torch.testing.assert_close(at_start, data, rtol=1e-4, atol=1e-4)


def test_skip_weights_are_those_of_the_definition():
    path, model = CosinePath(), model_of(prediction="data")
    options = {"boundary": "skip", "width": 0.5}
    method = ConsistencyDistillation(model, Independent(points(8)), **options)
    x, t = points(5), torch.linspace(0.2, 0.9, 5)
    nsr = (path.sigma(t) / path.alpha(t))[:, None]
    z = x / path.alpha(t)[:, None]
    with torch.no_grad():
        wanted = 0.25 / (nsr**2 + 0.25) * z
        wanted = wanted + nsr / (nsr**2 + 0.25).sqrt() * model.denoise(x, t)
        torch.testing.assert_close(method.estimate(model, x, t), wanted)


def test_the_copy_moves_once_a_step_and_gets_no_gradient():
    method = ConsistencyDistillation(model_of(), Independent(points(16)), decay=0.75)
    first = [p.clone() for p in method.model.parameters()]
    method.loss(Draw.of(16)).backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert any(p.grad.abs().sum() > 0 for p in method.model.parameters())
    with torch.no_grad():
        for p in method.model.parameters():
            p.add_(1)
    method.loss(Draw.of(16))
    assert all(torch.equal(a, b) for a, b in zip(first, method.target.parameters()))
    # Two micro-batches of the next step move it by a quarter, once.
    for part in (slice(0, 8), slice(8, 16)):
        method.loss(Draw.of(16, step=1, part=part))
    for a, b in zip(first, method.target.parameters()):
        torch.testing.assert_close(b, a + 0.25)


def test_labels_reach_all_three_networks():
    from rectiflow.flows.couplings import TensorData

    data = TensorData(points(16), {"label": torch.arange(16) % 3})
    method = ConsistencyDistillation(model_of(classes=3), Independent(data))
    other = TensorData(points(16), {"label": (torch.arange(16) + 1) % 3})
    changed = ConsistencyDistillation(model_of(classes=3), Independent(other))
    assert method.loss(Draw.of(16)).isfinite()
    assert method.loss(Draw.of(16)) != changed.loss(Draw.of(16))


def settings(steps, **options):
    optim = OptimizerSettings(learning_rate=3e-3)
    return TrainerSettings(steps=steps, batch_size=128, ema=0.98, optim=optim, **options)


def test_resumed_training_equals_an_uninterrupted_one(tmp_path):
    def method():
        return ConsistencyDistillation(model_of(), Independent(points(64)), steps=8)

    whole = Trainer(method(), settings(8)).fit()

    # The same run with a kill after five steps.
    class Killed(Exception):
        pass

    def kill(trainer, step):
        if step == 5:
            raise Killed

    options = {"checkpoint_every": 4}
    with pytest.raises(Killed):
        Trainer(method(), settings(8, **options), folder=tmp_path, callbacks=[kill]).fit()
    resumed = Trainer(method(), settings(8, **options), folder=tmp_path).fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_training_brings_one_step_nearer():
    data = points(2000, seed=4) * torch.tensor([0.3, 1.5]) + 1
    start = Trainer(FlowMatching(model_of(), Independent(data)), settings(100)).fit()
    method = ConsistencyDistillation(start, Independent(data), steps=12)
    trained = Trainer(method, settings(80)).fit()
    source = points(500, seed=9)
    wanted = sample(start, source=source, steps=50, solver="first-order")
    assert trained.sampling == {"solver": "first-order", "steps": 1, "made_for": 1}
    before = sample(start, source=source, steps=1, solver="first-order")
    errors = [float((x - wanted).square().mean()) for x in (before, sample(trained, source=source))]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    "prediction, options, message",
    [
        ("data", {}, "a data prediction is not tied to the state at the data end"),
        ("noise", {}, "a noise prediction says nothing of the data at t = 0"),
        ("v", {"boundary": "huber"}, "unknown boundary 'huber'"),
        ("v", {"decay": 1.0}, "decay must be in"),
        ("v", {"width": 0.0}, "width must be > 0"),
        ("v", {"steps": [1.0, 0.0]}, r"times must rise from 0 .* to 1 .* got 1 to 0"),
        ("v", {"steps": [0.0, 0.5, 0.9]}, r"times must rise from 0 .* to 1 .* got 0 to 0.9"),
        ("v", {"steps": [0.1, 1.0]}, r"times must rise from 0 .* to 1 .* got 0.1 to 1"),
        ("v", {"guided": APG(model_of(), 2.0, momentum=-0.5)}, r"single steps .* set momentum=0"),
    ],
)
def test_wrong_choices_are_refused(prediction, options, message):
    model = model_of(prediction=prediction)
    with pytest.raises(ValueError, match=message):
        ConsistencyDistillation(model, Independent(points(8)), **options)
