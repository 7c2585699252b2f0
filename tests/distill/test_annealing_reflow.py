"""Annealing reflow: whose weights, which pairs, how long."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import AnnealingReflow, new_student
from rectiflow.distill.reflow import reflow_rounds
from rectiflow.flows import FlowModel, LivePairs, PseudoHuber, Uniform
from rectiflow.flows.annealing import Constant, Exponential, Linear
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.nets import build
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings

SMALL = "mlp:width=8,depth=1"


def teacher(classes: int = 0, path=None) -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(2,), width=32, depth=2, classes=classes, zero=False)
    return FlowModel(net, path, shape=(2,), data={"name": "points"}, lineage=[{"method": "flow"}])


def method(model: FlowModel, **options) -> AnnealingReflow:
    return AnnealingReflow(model, LivePairs(model, 2), **{"student": SMALL, **options})


def test_the_student_is_new_small_and_decided_by_the_seed():
    model = teacher()
    first, again, other = (method(model, seed=seed).model for seed in (1, 1, 2))
    assert first.net.config["width"] == 8
    assert (first.shape, first.data, first.path.name) == ((2,), {"name": "points"}, "rectified")
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_the_students_weights_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    method(teacher())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_of_your_own_is_taken_as_it_is():
    model, net = teacher(), build("mlp", shape=(2,), width=4, depth=1)
    assert method(model, student=net).model.net is net
    student = FlowModel(net, shape=(2,))
    assert method(model, student=student).model is student


def test_after_the_ramp_the_loss_is_flow_matching_on_the_pairs():
    model = teacher()
    annealed = method(model, schedule=Linear(5))
    plain = FlowMatching(annealed.model, LivePairs(model, 2))
    assert torch.equal(annealed.loss(Draw.of(16, step=5)), plain.loss(Draw.of(16, step=5)))
    assert not torch.equal(annealed.loss(Draw.of(16, step=4)), plain.loss(Draw.of(16, step=4)))


def test_options_are_taken():
    options = {"premetric": PseudoHuber(0.1), "times": Uniform(0.1, 0.9), "condition_dropout": 0.2}
    made = method(teacher(classes=3), **options)
    assert {name: getattr(made, name) for name in options} == options
    assert made.schedule == Linear(300_000)


def test_a_teacher_on_another_path_only_lends_its_pairs():
    made = method(teacher(path=VariancePreservingPath()), schedule=Constant(0))
    assert made.model.path.name == "rectified"
    assert bool(made.loss(Draw.of(8)).isfinite())


def test_conditional_teachers_make_conditional_students():
    model = teacher(classes=3)
    labels = TensorData(torch.zeros(9, 2), {"label": torch.arange(9) % 3})
    made = AnnealingReflow(model, LivePairs(model, 2, labels=labels), student=SMALL)
    assert made.model.net.classes == 3
    assert bool(made.loss(Draw.of(8)).isfinite())


def test_trainings_that_end_on_the_ramp_are_refused():
    made = method(teacher(), schedule=Linear(100))
    with pytest.raises(ValueError, match="ends after 100 steps and the training after 99"):
        Trainer(made, TrainerSettings(steps=99))
    Trainer(made, TrainerSettings(steps=100))
    with pytest.warns(UserWarning, match="keeps some fresh noise to the end"):
        Trainer(method(teacher(), schedule=Exponential(5)), TrainerSettings(steps=99))


def test_a_small_student_learns_the_teachers_map():
    # The teacher's map is z -> 3 z + 1 at every number of steps: v(x, t) = (2 x + 1) / (1 + 2 t).
    class Affine(torch.nn.Module):
        def forward(self, x, t):
            return (2 * x + 1) / (1 + 2 * t[:, None])

    model = FlowModel(Affine(), shape=(2,))
    settings = TrainerSettings(
        steps=240, batch_size=128, ema=0.9, optim=OptimizerSettings(learning_rate=1e-2)
    )
    made = AnnealingReflow(
        model, LivePairs(model, 1), student="mlp:width=16,depth=1", schedule=Linear(90)
    )
    student = Trainer(made, settings).fit()
    z = torch.randn(512, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        error = (z + student(z, torch.zeros(512)) - (3 * z + 1)).square().mean()
    # A first flow would give the mean of the targets in one step, an error of 9.
    assert error < 0.5


def test_annealing_counts_as_a_round_of_reflow():
    model = teacher()
    model.lineage += [{"method": "reflow"}, {"method": "annealing"}, {"method": "distil"}]
    assert reflow_rounds(model) == 2


def test_students_from_folders_keep_their_weights(tmp_path):
    trained = FlowModel(build("mlp", shape=(2,), width=6, depth=1, zero=False), shape=(2,))
    trained.save_pretrained(tmp_path / "model")
    found = new_student(teacher(), str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), trained.parameters()))
    with pytest.raises(ValueError, match=r"with 0 classes, the teacher \(2,\) with 3"):
        new_student(teacher(classes=3), str(tmp_path / "model"))


def test_students_may_keep_the_teachers_path():
    model = FlowModel(teacher().net, VariancePreservingPath(), "noise", shape=(2,))
    kept = new_student(model, SMALL, keep_path=True)
    assert (kept.path, kept.prediction) == (model.path, "noise")
    assert new_student(model, SMALL).prediction == "velocity"


def test_wrong_students():
    with pytest.raises(ValueError, match="unknown net 'mpl': did you mean 'mlp'"):
        method(teacher(), student="mpl")
    with pytest.raises(ValueError, match="does not know its sample shape"):
        new_student(FlowModel(lambda x, t: x), SMALL)
