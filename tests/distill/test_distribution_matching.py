"""Distribution matching: the plain method bit for bit, fixed points, closed forms, resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from rectiflow.distill import DistributionMatching, FDistill, constant_ratio
from rectiflow.distill.density_ratio import Discriminator
from rectiflow.distill.distribution_matching import matching_gradient, matching_loss
from rectiflow.distill.few_steps import FewSteps, start_times
from rectiflow.distill.ratio_weights import RatioWeights
from rectiflow.flows import FlowModel, Independent, LivePairs, sample
from rectiflow.flows.analytic import GaussianField
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.times import Uniform
from rectiflow.guidance import APG
from rectiflow.nets import MLP
from rectiflow.training import OptimizerSettings, Trainer, TrainerSettings

DATA = torch.randn(300, 2, generator=torch.Generator().manual_seed(5)) + 1


def make(seed: int = 0, *, path=None, prediction: str = "velocity", **config) -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MLP(shape=(2,), **{"width": 16, "depth": 1, "zero": False, **config})
    return FlowModel(net, path, prediction, shape=(2,))


def matching(teacher=None, data=DATA, **options) -> DistributionMatching:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DistributionMatching(teacher or make(), data, **options)


def awaken(method: DistributionMatching) -> None:
    """A discriminator that says something."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for p in method.judge.discriminator.parameters():
            nn.init.normal_(p, std=0.5)


def gradients(module: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("path", [RectifiedPath(), VariancePreservingPath()], ids=["rect", "vp"])
def test_invariant_3_reverse_divergence_is_plain_distribution_matching(path, prediction):
    teacher = make(path=path, prediction=prediction)
    fake = make(3, path=path, prediction=prediction)
    options = {"fake": fake, "divergence": "rkl", "gan_weight": 0.0}
    method = matching(teacher, None, **options)
    assert [phase.name for phase in method.phases()] == ["student", "fake"]
    found = gradients(method.model, method.student_loss(Draw.of(32, step=4)))

    # The published rule, written out.
    draw, student = Draw.of(32, step=4), copy.deepcopy(teacher)
    z, noise = draw.normal((2,)), draw.normal((2,))
    t = Uniform(0.02, 0.98).sample(32, generator=draw.generator)
    x = student.denoise(path.sigma(torch.zeros(())) * z, torch.zeros(32))
    with torch.no_grad():
        x_t = path.interpolate(noise, x, t)
        real, wrong = teacher.denoise(x_t, t), fake.denoise(x_t, t)
        gradient = (wrong - real) * (1 / ((x - real).abs().mean(1) + 1e-6))[:, None]
    loss = 0.5 * (x - x.detach() + gradient).square().mean()
    for a, b in zip(found, gradients(student, loss)):
        assert torch.equal(a, b)


def test_constant_ratio_makes_every_divergence_the_plain_one():
    draw = Draw.of(32)
    plain = matching(fake=make(3), divergence="rkl", gan_weight=0.0)
    other = matching(fake=make(3), divergence="js", gan_weight=0.0, ratio=constant_ratio)
    assert other.judge is None
    for a, b in zip(
        gradients(plain.model, plain.student_loss(draw)),
        gradients(other.model, other.student_loss(Draw.of(32))),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", ["rkl", "js", "kl"])
def test_invariant_6_nothing_moves_when_the_fake_flow_is_the_teacher(divergence):
    method = matching(divergence=divergence, gan_weight=0.0)
    loss = method.student_loss(Draw.of(16))
    assert float(loss.detach()) == 0
    assert all(not g.any() for g in gradients(method.model, loss) if g is not None)


def test_invariant_7_gradient_of_the_loss_is_the_given_one():
    x = (100 * torch.randn(7, 3, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    wanted = 1e-4 * torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(matching_loss(x, wanted), x)
    # One product and one quotient: exact to rounding although x is a million times larger.
    torch.testing.assert_close(found, wanted / x.numel(), rtol=1e-6, atol=0)


def test_matching_gradient_points_from_teacher_to_fake():
    x = torch.zeros(1, 2)
    found = matching_gradient(x, torch.tensor([[3.0, 0.0]]), torch.ones(1, 2), 2 * torch.ones(1))
    # Twice (2, -1) over a mean distance of one.
    torch.testing.assert_close(found, torch.tensor([[4.0, -2.0]]))
    half = [v.half() for v in (x + 60_000, x, x + 1)]
    assert matching_gradient(*half, torch.ones(1)).isfinite().all()


def test_known_ratio_weights_the_samples():
    def ratio(x, t):
        return torch.linspace(-2, 2, len(x))

    options = {"fake": make(3), "gan_weight": 0.0, "weights": RatioWeights(bins=0)}
    method = matching(divergence="kl", ratio=ratio, **options)
    weights = torch.linspace(-2, 2, 32).exp()
    weights /= weights.mean()
    torch.testing.assert_close(method._weigh(DATA[:32], torch.rand(32), {}, None), weights)
    # The loss is half the mean square of the gradient, so weights come in squared.
    found = method.student_loss(Draw.of(32)).detach()
    plain = matching(divergence="rkl", **options)
    rows = [plain.student_loss(Draw.of(32, part=slice(row, row + 1))).detach() for row in range(32)]
    torch.testing.assert_close(found, (weights.square() * torch.stack(rows)).mean())


def test_adversarial_loss_moves_the_student_and_nothing_else():
    method = matching(gan_weight=0.5)
    awaken(method)
    # The fake flow still is the teacher, so the adversarial loss is all there is.
    loss = method.student_loss(Draw.of(64))
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in method.model.parameters())
    for module in (method.judge.discriminator, method.fake, method.teacher):
        assert all(p.grad is None for p in module.parameters())
    draw = Draw.of(64)
    given = method.generator.given(draw)
    t = method.times.sample(64, generator=draw.generator)
    x = method.model.denoise(given.source, torch.zeros(64))
    logits = method.judge.logits(RectifiedPath().interpolate(given.noise, x, t), t, {})
    torch.testing.assert_close(loss, 0.5 * nn.functional.softplus(-logits).mean())


def test_discriminator_loss_sees_fakes_and_reals():
    method = matching(divergence="js", same_noise=True)
    awaken(method)
    found = method.discriminator_loss(Draw.of(40, step=2))
    draw = Draw.of(40, step=2)
    real = Independent(DATA).draw(draw).target
    z, noise = draw.normal((2,)), draw.normal((2,))
    t = method.times.sample(40, generator=draw.generator)
    fake = method.model.denoise(z, torch.zeros(40)).detach()
    path, judge = RectifiedPath(), method.judge
    logits = [judge.logits(path.interpolate(noise, x, t), t, {}) for x in (fake, real)]
    softplus = nn.functional.softplus
    torch.testing.assert_close(found, (softplus(logits[0]) + softplus(-logits[1])).mean())
    # Reals with times and noises of their own score otherwise.
    method.same_noise = False
    assert method.discriminator_loss(Draw.of(40, step=2)) != found


def test_gradient_penalty_counts_disturbed_reals():
    method = matching(r1=0.0)
    awaken(method)
    plain = method.discriminator_loss(Draw.of(40))
    method.r1 = 100.0
    assert method.discriminator_loss(Draw.of(40)) > plain
    with torch.no_grad():
        for p in method.judge.discriminator.parameters():
            p.zero_()
    assert float(method.discriminator_loss(Draw.of(40)).detach()) == pytest.approx(2 * math.log(2))


def test_fake_flow_learns_the_students_samples_in_its_own_prediction():
    student = make(7)
    method = matching(make(prediction="noise"), student=student, divergence="rkl", gan_weight=0.0)
    found = method.fake_loss(Draw.of(50))
    draw = Draw.of(50)
    Independent(DATA).draw(draw)
    z, noise = draw.normal((2,)), draw.normal((2,))
    t = method.times.sample(50, generator=draw.generator)
    x = student.denoise(z, torch.zeros(50)).detach()
    wanted = (method.fake(RectifiedPath().interpolate(noise, x, t), t) - noise).square().mean()
    torch.testing.assert_close(found, wanted)


def test_samples_are_made_once_a_step_and_anew_after_an_update():
    method = matching()
    calls = []
    method.model.net.register_forward_hook(lambda *rest: calls.append(1))
    method.fake_loss(Draw.of(8))
    method.discriminator_loss(Draw.of(8))
    assert len(calls) == 1
    with torch.no_grad():
        next(method.model.parameters()).add_(1.0)
    method.fake_loss(Draw.of(8))
    method.fake_loss(Draw.of(8, step=1))
    method.fake_loss(Draw.of(8, step=1, part=slice(0, 4)))
    assert len(calls) == 4
    assert len(method.generator._made) == 2


def test_processes_share_a_step():
    method = matching(steps=2)
    whole = method.generator.samples(Draw.of(8), method.generator.given(Draw.of(8)))
    halves = [
        method.generator.samples(d, method.generator.given(d))
        for d in (Draw.of(8, part=slice(0, 4)), Draw.of(8, part=slice(4, 8)))
    ]
    torch.testing.assert_close(torch.cat(halves), whole)


def test_one_step_is_what_sampling_does():
    for path, solver in ((RectifiedPath(), "euler"), (VariancePreservingPath(), "renoise")):
        method = matching(make(path=path), None, divergence="rkl", gan_weight=0.0)
        assert method.model.sampling["solver"] == solver
        assert method.model.sampling["made_for"] == 1
        given = method.generator.given(Draw.of(6))
        made = method.generator.samples(Draw.of(6), given)
        # The variance-preserving estimate divides by alpha(0) = 0.0066: 1e-5 of its size is left.
        torch.testing.assert_close(
            sample(method.model, source=given.source), made, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("simulate", [False, True])
def test_steps_are_fed_with_noised_data_or_own_samples(simulate):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.full((), 5.0))

        def forward(self, x, t):
            seen.append((x.detach(), t))
            return x * 0 + self.shift

    model = FlowModel(Spy(), prediction="data", shape=(2,))
    generator = FewSteps(model, (0.0, 0.4), simulate, Independent(DATA))
    given = generator.given(Draw.of(200))
    generator.generate(given)
    x, t = seen[-1]
    first = t == 0
    assert torch.equal(t, torch.where(given.chosen == 0, 0.0, 0.4))
    assert 60 < int(first.sum()) < 140
    assert torch.equal(x[first], given.source[first])
    if simulate:
        expected = 0.4 * 5 + 0.6 * given.fresh[0]
    else:
        expected = 0.4 * given.real.target + 0.6 * given.source
    torch.testing.assert_close(x[~first], expected[~first])
    assert len(seen) == (2 if simulate else 1)
    assert generator.sampling == {
        "solver": "renoise", "steps": [0.0, 0.4, 1.0], "made_for": 2,
    }  # fmt: skip


def test_start_times():
    assert start_times(4) == (0.0, 0.25, 0.5, 0.75)
    for wrong in ((), (0.1, 0.5), (0.0, 1.0), (0.0, 0.5, 0.5)):
        with pytest.raises(ValueError, match="must start at 0 and rise below 1"):
            start_times(wrong)


class Guided:
    """Classifier-free guidance by hand, both branches in one batch."""

    def __init__(self, field: FlowModel, scale: float) -> None:
        self.field, self.scale, self.path = field, scale, field.path

    def denoise(self, x, t, *, label):
        null = self.field.null_condition(label=label)["label"]
        found = self.field.denoise(
            torch.cat([x, x]), torch.cat([t, t]), label=torch.cat([label, null])
        )
        with_label, without = found.chunk(2)
        return without + self.scale * (with_label - without)

    velocity = noise = denoise


def test_guided_conditional_teacher():
    data = TensorData(DATA, {"label": torch.arange(300) % 3})
    model = make(classes=3)
    guided = matching(Guided(model, 2.0), data, fake=make(3, classes=3), divergence="js")
    plain = matching(model, data, fake=make(3, classes=3), divergence="js")
    assert guided.judge.inside is model
    # Guidance moves the target of the student but not what the discriminator sees.
    for m in (guided, plain):
        awaken(m)
    x, t, label = DATA[:4], torch.rand(4), {"label": torch.tensor([0, 1, 2, 0])}
    (a, logits), (b, expected) = (
        m.judge.estimate(x, t, label, gradient=False) for m in (guided, plain)
    )
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(a, b)
    losses = [float(m.student_loss(Draw.of(16)).detach()) for m in (guided, plain)]
    assert losses[0] != losses[1]
    trained = Trainer(guided, TrainerSettings(steps=2, batch_size=8)).fit()
    made = sample(trained, 3, label=torch.tensor([0, 1, 2]))
    assert made.isfinite().all()


def test_students_may_be_smaller_and_on_another_path():
    student = make(9, path=VariancePreservingPath(), prediction="data", width=8)
    method = matching(student=student, divergence="kl")
    assert method.model is not student
    assert method.student_loss(Draw.of(8)).isfinite()
    assert method.fake.path == RectifiedPath()
    assert FDistill is DistributionMatching


def test_closed_form_teacher_pulls_the_generator_to_its_data():
    # All in closed form but the generator: data N(2, 0.5²), fake flow exact for N(m, s²).
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.std = (nn.Parameter(torch.full((16,), v)) for v in (0.0, 1.0))

        def forward(self, x, t):
            return self.mean + self.std * x

    student = FlowModel(Shift(), prediction="data", shape=(16,))
    teacher = GaussianField(torch.full((16,), 2.0), torch.full((16,), 0.5))
    data = 2 + 0.5 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    method = DistributionMatching(
        teacher, data, student=student, ratio=constant_ratio, gan_weight=0.0, divergence="js"
    )
    optimizer = torch.optim.Adam(method.model.parameters(), 5e-2)
    net = method.model.net
    for step in range(100):
        exact = GaussianField(net.mean.detach(), net.std.detach().abs())
        method.fake.denoise = exact.denoise
        loss = method.student_loss(Draw.of(64, step=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net.mean.mean().item() == pytest.approx(2.0, abs=0.1)
    assert net.std.abs().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("warmup", [0, 4])
def test_resumed_training_equals_the_uninterrupted_one(tmp_path, warmup):
    def fit(folder, stop=None, resume=False):
        def pull(trainer, step):
            if step == stop:
                raise RuntimeError("plug")

        method = matching(divergence="js", student_every=2, warmup=warmup)
        settings = TrainerSettings(steps=8, batch_size=32, checkpoint_every=2, ema=0.9)
        trainer = Trainer(method, settings, folder=folder, callbacks=[pull])
        return trainer.fit(resume=resume), method

    whole, method = fit(None)
    with pytest.raises(RuntimeError, match="plug"):
        fit(tmp_path, stop=3)
    again, resumed = fit(tmp_path, resume=True)
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert torch.equal(method.weights.means, resumed.weights.means)
    assert not torch.equal(method.weights.means, torch.ones(10))


def test_phases_have_their_own_pace_and_settings():
    fast, slow = OptimizerSettings(learning_rate=1e-2), OptimizerSettings(learning_rate=1e-5)
    method = matching(
        student_every=7,
        warmup=5,
        student_optimizer=slow,
        fake_optimizer=fast,
        discriminator_optimizer=fast,
    )
    student, fake, judge = method.phases()
    assert (student.every, student.first, student.optimizer) == (7, 5, slow)
    assert [p.optimizer for p in (fake, judge)] == [fast, fast]
    assert [s for s in range(20) if student.due(s)] == [5, 12, 19]
    assert all(fake.due(s) and judge.due(s) for s in range(20))


def test_real_data_may_come_from_the_teacher():
    teacher = make()
    method = matching(teacher, LivePairs(teacher, steps=2), divergence="js")
    assert method.discriminator_loss(Draw.of(8)).isfinite()


def test_a_discriminator_of_your_own():
    own = Discriminator([(3,)], width=4)

    def features(x, t):
        return torch.cat([x, t[:, None]], 1)

    method = matching(features=features, discriminator=own)
    assert method.judge.discriminator is own
    assert method.student_loss(Draw.of(8)).isfinite()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student_every": 0}, "student_every must be > 0, got 0"),
        ({"gan_weight": -1.0}, "gan_weight must be >= 0, got -1.0"),
        ({"divergence": "jz"}, "unknown divergence 'jz'"),
        ({"divergence": torch.sqrt}, "divergence 'sqrt' is not convex"),
        ({"data": None}, "the discriminator needs real data: give data, or take"),
        (
            {"data": None, "divergence": "rkl", "gan_weight": 0.0, "steps": 2},
            "later steps are fed with noised real data: give data, or pass simulate=True",
        ),
        ({"teacher": nn.Linear(2, 2)}, "the teacher must be a field with a path and denoise"),
        ({"teacher": GaussianField(torch.zeros(2), torch.ones(2))}, "has no network to start"),
        ({"fake": make(path=VariancePreservingPath())}, "the fake flow is on the path"),
        (
            {"student": FlowModel(MLP(shape=(3,), width=8, depth=1), shape=(3,))},
            r"makes samples of shape \(3,\), the teacher of \(2,\)",
        ),
        ({"data": torch.zeros(9, 3)}, r"states must have shape \(batch, 2\)"),
        ({"steps": (0.2,)}, "must start at 0"),
        ({"teacher": make(prediction="noise")}, "a noise prediction says nothing of the data"),
        ({"teacher": APG(make(), 2.0, momentum=-0.5)}, r"drawn anew, .* set momentum=0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        matching(**options)


def test_labels_need_data():
    with pytest.raises(ValueError, match="takes labels, which come with the data"):
        matching(make(classes=3), None, divergence="rkl", gan_weight=0.0)
