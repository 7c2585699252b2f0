"""Reflow and one-step distillation: closed forms, fixed points, limits."""

from __future__ import annotations

import warnings

import pytest
import torch

from rectiflow.distill import OneStepDistillation, Reflow
from rectiflow.distill.reflow import reflow_rounds
from rectiflow.flows import FlowModel, Independent, LivePairs, integrate
from rectiflow.flows.couplings import Draw, Pairs, TensorData
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.flows.premetrics import PseudoHuber
from rectiflow.nets import build
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings


class Fixed:
    """A coupling of given pairs, in order."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.source, self.target = source, target

    def draw(self, draw: Draw) -> Pairs:
        return Pairs(self.source[draw.part], self.target[draw.part])


def teacher(rounds: int = 0) -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(2,), width=32, depth=1, zero=False)
    lineage = [{"method": "flow"}, *[{"method": "reflow"}] * rounds]
    return FlowModel(net, shape=(2,), lineage=lineage)


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def test_reflow_loss_is_flow_matching_on_the_pairs():
    model, pairs = teacher(), Fixed(points(64, 1), points(64, 2))
    expected = FlowMatching(model, pairs).loss(Draw.of(64, step=3))
    assert torch.equal(Reflow(model, pairs).loss(Draw.of(64, step=3)), expected)


def test_students_start_from_a_copy_of_the_teacher():
    model = teacher()
    for method in (Reflow(model, LivePairs(model)), OneStepDistillation(model, LivePairs(model))):
        own = list(method.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(own, model.parameters()))
        with torch.no_grad():
            own[0].add_(1)
        assert not torch.equal(own[0], next(model.parameters()))
        with torch.no_grad():
            own[0].sub_(1)


def test_distillation_is_the_flow_loss_at_time_zero():
    # Spec 01, invariant 8: (z1 - z0 - v(z0, 0))² on the same pairs.
    model, source, target = teacher(), points(50, 1), points(50, 2)
    method = OneStepDistillation(model, Fixed(source, target))
    reached = source + model(source, torch.zeros(50))
    expected = (reached - target).square().mean()
    torch.testing.assert_close(method.loss(Draw.of(50)), expected)


def test_k_step_distillation_looks_only_at_the_starts_of_steps():
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            seen.append(t)
            return self.scale * x

    method = OneStepDistillation(
        FlowModel(Spy(), shape=(2,)), Fixed(*[points(400, 1)] * 2), steps=4
    )
    method.loss(Draw.of(400))
    assert sorted(set(seen[0].tolist())) == [0.0, 0.25, 0.5, 0.75]
    assert method.model.sampling == {"solver": "euler", "steps": 4, "made_for": 4}


def test_encoder_looks_only_at_the_data_end():
    source, target = points(50, 1), points(50, 2)
    model = teacher()
    method = OneStepDistillation(model, Fixed(source, target), encoder=True)
    reached = target - model(target, torch.ones(50))
    torch.testing.assert_close(method.loss(Draw.of(50)), (reached - source).square().mean())
    assert method.model.sampling["steps"] == [1.0, 0.0]


def test_predictions_that_say_nothing_where_the_steps_start_are_refused():
    net, pairs = teacher().net, Fixed(points(8, 1), points(8, 2))
    for prediction in ("noise", "score"):
        model = FlowModel(net, prediction=prediction, shape=(2,))
        with pytest.raises(ValueError, match=f"a {prediction} prediction says nothing of the data"):
            OneStepDistillation(model, pairs)
    noise = FlowModel(net, prediction="noise", shape=(2,))
    assert OneStepDistillation(noise, pairs, encoder=True).loss(Draw.of(8)).isfinite()
    data = FlowModel(net, prediction="data", shape=(2,))
    assert OneStepDistillation(data, pairs).loss(Draw.of(8)).isfinite()
    with pytest.raises(ValueError, match="a data prediction says nothing of the noise at t = 1"):
        OneStepDistillation(data, pairs, encoder=True)


def test_straight_coupling_is_learned_exactly_by_one_step():
    # X1 = A X0 + b with A positive definite: lines never cross, so V = 0 and one step is exact.
    matrix = torch.tensor([[2.0, 0.3], [0.3, 0.7]])
    source = points(2000, 3)
    target = source @ matrix + torch.tensor([1.0, -2.0])

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.nn.Parameter(matrix.clone())

        def forward(self, x, t):
            # Invert x_t = ((1 - t) I + t A) x_0 + t b sample by sample.
            mix = (1 - t)[:, None, None] * torch.eye(2) + t[:, None, None] * self.matrix
            shift = torch.tensor([1.0, -2.0])
            start = torch.linalg.solve(mix, (x - t[:, None] * shift)[:, :, None])[:, :, 0]
            return start @ self.matrix + shift - start

    model = FlowModel(Exact(), shape=(2,))
    # The loss of the exact field is V, which is 0 here; so reflow's gradient is 0: a fixed point.
    method = Reflow(model, Fixed(source, target))
    loss = method.loss(Draw.of(2000))
    assert float(loss.detach()) < 1e-10
    (gradient,) = torch.autograd.grad(loss, list(method.model.parameters()))
    assert float(gradient.abs().max()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(integrate(model, source, 1), target, rtol=1e-5, atol=1e-5)


def test_reflow_straightens_a_small_flow():
    from rectiflow.flows.metrics import straightness, transport_cost

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2000, 2, generator=generator) * 0.3
    data = data + 2 * (torch.randint(2, (2000, 2), generator=generator) * 2 - 1)
    settings = TrainerSettings(
        steps=250, batch_size=256, ema=0.98, optim=OptimizerSettings(learning_rate=3e-3)
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build("mlp", shape=(2,), width=64, depth=2)
    first = Trainer(
        FlowMatching(FlowModel(net, shape=(2,)), Independent(TensorData(data))), settings
    ).fit()
    second = Trainer(Reflow(first, LivePairs(first, steps=20)), settings).fit()
    source = points(1000, 9)
    before, after = (straightness(m, source, 50).total for m in (first, second))
    assert after < before / 4
    with torch.no_grad():
        costs = [transport_cost(source, integrate(m, source, 50)) for m in (first, second)]
    assert costs[1] <= 1.05 * costs[0]


def test_more_than_three_rounds_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reflow(teacher(2), LivePairs(teacher()))
    with pytest.warns(UserWarning, match="reflow round 4: beyond 3 rounds"):
        Reflow(teacher(3), LivePairs(teacher()))
    assert reflow_rounds(teacher(3)) == 3


def test_premetric_is_taken():
    model, pairs = teacher(), Fixed(points(20, 1), points(20, 2))
    method = Reflow(model, pairs, premetric=PseudoHuber(c=0.1))
    assert method.premetric == PseudoHuber(c=0.1)
    assert method.loss(Draw.of(20)) != Reflow(model, pairs).loss(Draw.of(20))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be > 0, got 0"),
        ({"steps": 2, "encoder": True}, "one-step encoder has one step, got steps=2"),
    ],
)
def test_wrong_distillation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OneStepDistillation(teacher(), LivePairs(teacher()), **options)


def test_curved_path_is_refused():
    curved = FlowModel(teacher().net, VariancePreservingPath(), shape=(2,))
    with pytest.raises(ValueError, match="needs a model on the rectified path, got 'vp'"):
        OneStepDistillation(curved, LivePairs(curved))
