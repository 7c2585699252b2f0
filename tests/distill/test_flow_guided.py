"""Flow-guided distillation: its formula, its limits, where gradients go."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import FlowGuidedDistillation, OneStepDistillation
from rectiflow.flows import L2, FlowModel, PseudoHuber
from rectiflow.flows.couplings import Draw, Pairs
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.guidance import APG
from rectiflow.nets import build
from rectiflow.training import OptimizerSettings, Trainer, TrainerSettings


class Fixed:
    """Pairs from a generator of their own, so that the draw's stays fresh."""

    def __init__(self, count: int = 32, classes: int = 0) -> None:
        generator = torch.Generator().manual_seed(4)
        self.source, self.target = torch.randn(2, count, 2, generator=generator)
        self.condition = {"label": torch.arange(count) % classes} if classes else {}

    def draw(self, draw: Draw) -> Pairs:
        condition = {name: value[draw.part] for name, value in self.condition.items()}
        return Pairs(self.source[draw.part], self.target[draw.part], condition)


def model(seed: int = 0, classes: int = 0) -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build("mlp", shape=(2,), width=16, depth=1, classes=classes, zero=False)
    return FlowModel(net, shape=(2,))


def by_hand(teacher, student, pairs, draw, first_step, u_range=(0.2, 0.8), **condition):
    """Both losses, written out."""
    zero = torch.zeros(len(pairs.source))
    with torch.no_grad():
        fresh = draw.normal((2,))
        u = u_range[0] + (u_range[1] - u_range[0]) * draw.uniform()
        who = student if first_step == "student" else teacher
        middle = fresh + u[:, None] * who.velocity(fresh, zero, **condition)
        target = middle + (1 - u[:, None]) * teacher.velocity(middle, u, **condition)
    distill = pairs.source + student.velocity(pairs.source, zero, **condition) - pairs.target
    two = fresh + student.velocity(fresh, zero, **condition) - target
    return distill.square().mean(), two.square().mean()


@pytest.mark.parametrize("first_step", ["student", "teacher"])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_loss_is_the_formula(first_step, classes):
    teacher, student, pairs = model(1, classes), model(2, classes), Fixed(classes=classes)
    method = FlowGuidedDistillation(
        teacher, pairs, student=student, first_step=first_step, weight=0.7
    )
    distill, two = by_hand(teacher, student, pairs, Draw.of(32), first_step, **pairs.condition)
    torch.testing.assert_close(method.loss(Draw.of(32)), distill + 0.7 * two)


def test_without_the_two_steps_it_is_one_step_distillation():
    teacher, pairs = model(), Fixed()
    method = FlowGuidedDistillation(teacher, pairs, weight=0)
    expected = OneStepDistillation(teacher, pairs).loss(Draw.of(32))
    torch.testing.assert_close(method.loss(Draw.of(32)), expected)
    assert method.model.sampling == {"solver": "euler", "steps": 1, "made_for": 1}


class Straight(torch.nn.Module):
    """The field of z -> A z + b, constant along its straight ways."""

    def __init__(self):
        super().__init__()
        matrix = torch.tensor([[2.0, 0.3], [0.3, 0.7]], dtype=torch.float64)
        self.matrix = torch.nn.Parameter(matrix)
        self.shift = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, x, t):
        eye = torch.eye(2, dtype=torch.float64)
        mix = (1 - t)[:, None, None] * eye + t[:, None, None] * self.matrix
        start = torch.linalg.solve(mix, (x - t[:, None] * self.shift)[:, :, None])[:, :, 0]
        return start @ self.matrix + self.shift - start


@pytest.mark.parametrize("first_step", ["student", "teacher"])
@pytest.mark.parametrize("u", [0.0, 0.3, 0.9, 1.0])
def test_invariant_5_a_straight_teacher_asks_nothing_of_itself(first_step, u):
    class Exact(Fixed):
        def draw(self, draw):
            source = super().draw(draw).source.double()
            return Pairs(source, source + Straight()(source, torch.zeros(len(source)).double()))

    teacher = FlowModel(Straight(), shape=(2,))
    method = FlowGuidedDistillation(teacher, Exact(), first_step=first_step, u_range=(u, u))
    # Rounding of float64, squared.
    assert float(method.loss(Draw.of(32)).detach()) < 1e-25


def test_invariant_6_limits_of_the_time_between_the_steps():
    teacher, student = model(1), model(2)
    method = FlowGuidedDistillation(teacher, Fixed(), student=student)
    z, zero, one = torch.randn(8, 2), torch.zeros(8), torch.ones(8)
    with torch.no_grad():
        own, theirs = student.velocity(z, zero), teacher.velocity(z, zero)
    for first in (own, None):
        torch.testing.assert_close(method.two_steps(z, zero, first), z + theirs)
    torch.testing.assert_close(method.two_steps(z, one, own), z + own)
    torch.testing.assert_close(method.two_steps(z, one), z + theirs)
    # And near them, in between.
    near = method.two_steps(z, zero + 1e-4, own)
    torch.testing.assert_close(near, z + theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("first_step", ["student", "teacher"])
def test_invariant_7_no_gradient_reaches_target_or_teacher(first_step):
    teacher, student, pairs = model(1), model(2), Fixed()
    method = FlowGuidedDistillation(teacher, pairs, student=student, first_step=first_step)
    method.loss(Draw.of(32)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in student.parameters())
    found = [p.grad for p in method.model.parameters()]
    losses = by_hand(teacher, student, pairs, Draw.of(32), first_step)
    for mine, wanted in zip(found, torch.autograd.grad(sum(losses), student.parameters())):
        torch.testing.assert_close(mine, wanted)


def test_training_moves_the_student_only():
    teacher = model(1)
    before = [p.clone() for p in teacher.parameters()]
    method = FlowGuidedDistillation(teacher, Fixed())
    optim = OptimizerSettings(learning_rate=1e-2)
    trained = Trainer(method, TrainerSettings(steps=3, batch_size=32, ema=0, optim=optim)).fit()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before))
    assert not any(torch.equal(a, b) for a, b in zip(trained.net.parameters(), before))


def test_the_teacher_is_evaluated_without_dropout():
    teacher = FlowModel(
        build("mlp", shape=(2,), width=16, depth=1, dropout=0.5, zero=False), shape=(2,)
    )
    method = FlowGuidedDistillation(teacher.train(), Fixed())
    z, half = torch.randn(8, 2), torch.full((8,), 0.5)
    assert torch.equal(method.two_steps(z, half), method.two_steps(z, half))
    assert teacher.training


def test_a_guided_field_takes_the_teachers_steps():
    method = FlowGuidedDistillation(model(), Fixed(), guided=lambda x, t: torch.ones_like(x))
    z = torch.randn(8, 2)
    torch.testing.assert_close(method.two_steps(z, torch.full((8,), 0.3)), z + 1)


def test_any_premetric_sees_both_losses():
    seen = []

    def spy(regression):
        seen.append(regression)
        return L2()(regression)

    pairs = Fixed()
    method = FlowGuidedDistillation(model(), pairs, premetric=spy)
    method.loss(Draw.of(32))
    (regression,) = seen
    assert torch.equal(regression.target[:32], pairs.target)
    assert bool((regression.t == 0).all())
    # A perceptual loss compares estimate and target; here their difference is the plain one.
    torch.testing.assert_close(
        regression.estimate - regression.target, regression.difference, atol=1e-6, rtol=1e-5
    )
    assert FlowGuidedDistillation(model(), pairs, premetric=PseudoHuber(1.0)).premetric.c == 1.0


def test_parts_make_the_whole():
    method = FlowGuidedDistillation(model(1), Fixed(), student=model(2))
    whole = method.loss(Draw.of(32))
    halves = [method.loss(Draw.of(32, part=slice(i, i + 16))) for i in (0, 16)]
    torch.testing.assert_close(sum(halves) / 2, whole)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"first_step": "teecher"}, "unknown first step 'teecher': did you mean 'teacher'"),
        ({"u_range": (0.8, 0.2)}, r"u_range needs 0 <= low <= high <= 1, got \(0.8, 0.2\)"),
        ({"u_range": (0.0, 1.1)}, "u_range needs"),
        ({"weight": -1.0}, "weight must be >= 0, got -1"),
        ({"guided": APG(model(), 2.0, momentum=-0.5)}, r"drawn anew, .* set momentum=0"),
        (
            {"student": FlowModel(model().net, prediction="noise", shape=(2,))},
            "a noise prediction says nothing of the data at t = 0",
        ),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        FlowGuidedDistillation(model(), Fixed(), **options)


def test_paths_must_agree():
    curved = FlowModel(model().net, VariancePreservingPath(), shape=(2,))
    with pytest.raises(ValueError, match="one path, got 'vp' for the teacher and 'rectified'"):
        FlowGuidedDistillation(curved, Fixed(), student=model())
    with pytest.raises(ValueError, match="needs a model on the rectified path"):
        FlowGuidedDistillation(curved, Fixed())
