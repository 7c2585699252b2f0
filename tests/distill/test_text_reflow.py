"""Conditional reflow with guidance in the pairs: invariants 1, 3, 5 and 7 of the specification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rectiflow.distill import OneStepDistillation, TextReflow
from rectiflow.flows import FlowModel, Independent, LivePairs, VariancePreservingPath, sample
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.nets import MLP
from rectiflow.training import Trainer, TrainerSettings
from rectiflow.training.optimizers import OptimizerSettings


def labels(count: int = 64) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 2, generator=generator)
    return TensorData(values, {"label": torch.randint(3, (count,), generator=generator)})


def model() -> FlowModel:
    torch.manual_seed(0)
    net = MLP(shape=(2,), width=16, depth=1, classes=3, zero=False)
    return FlowModel(net, shape=(2,))


class Constant(nn.Module):
    """A velocity that depends on the label alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.0, 0.0]]))

    def forward(self, x, t, *, label):
        return self.table[label] + 0 * x

    def null_condition(self, *, label):
        return {"label": torch.full_like(label, 2)}


def test_constant_fields_are_straight_already() -> None:
    """Invariant 3: any number of steps ends alike, and reflow on the own pairs has no loss."""
    teacher = FlowModel(Constant(), shape=(2,))
    label = torch.tensor([0, 1, 0])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    ends = [sample(teacher, source=x, steps=n, label=label) for n in (1, 3, 8)]
    torch.testing.assert_close(ends[0], x + teacher.net.table[label].detach())
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])
    data = TensorData(torch.zeros(2, 2), {"label": torch.tensor([0, 1])})
    pairs = LivePairs(teacher, 4, labels=data)
    loss = TextReflow(teacher, pairs, condition_dropout=0.0).loss(Draw.of(8))
    assert float(loss.detach()) < 1e-12


def test_guidance_is_linear_in_its_scale() -> None:
    """Invariant 1."""
    field, x, t = model(), torch.randn(4, 2), torch.rand(4)
    label = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        at = {
            s: ClassifierFreeGuidance(field, s).velocity(x, t, label=label) for s in (0.0, 1.0, 2.5)
        }
        assert torch.equal(at[1.0], field.velocity(x, t, label=label))
        torch.testing.assert_close(at[0.0], field.velocity(x, t))
    torch.testing.assert_close(at[2.5], at[0.0] + 2.5 * (at[1.0] - at[0.0]))


def test_pairs_are_guided_and_training_is_not() -> None:
    teacher, data = model(), labels()
    guided = ClassifierFreeGuidance(teacher, 3.0)
    pairs = LivePairs(teacher, 2, labels=data, guided=guided).draw(Draw.of(8))
    plain = LivePairs(teacher, 2, labels=data).draw(Draw.of(8))
    assert torch.equal(pairs.source, plain.source)
    assert not torch.allclose(pairs.target, plain.target, atol=1e-3)
    method = TextReflow(teacher, LivePairs(teacher, 2, labels=data, guided=guided))
    rows: list[int] = []
    method.model.net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.loss(Draw.of(8))
    assert rows == [8]  # no second branch


def test_distillation_is_reflow_at_the_noise_end() -> None:
    """Invariant 5: z + v(z, 0) against the target is the flow matching loss at t = 0."""
    teacher, data = model(), labels()
    pairs = LivePairs(teacher, 2, labels=data)
    method = OneStepDistillation(teacher, pairs)
    drawn = pairs.draw(Draw.of(8))
    one = drawn.source + teacher.velocity(drawn.source, torch.zeros(8), **drawn.condition)
    expected = (one - drawn.target).square().mean()
    torch.testing.assert_close(method.loss(Draw.of(8)), expected)
    reflow = TextReflow(teacher, pairs, condition_dropout=0)
    at_noise = reflow.losses(drawn, torch.zeros(8), drawn.condition).mean()
    torch.testing.assert_close(at_noise, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_alone_reaches_the_null_condition(dropout: float) -> None:
    """Invariant 7: without dropout no gradient reaches the null embedding."""
    start = model()
    method = TextReflow(start, Independent(labels()), condition_dropout=dropout)
    method.loss(Draw.of(32)).backward()
    (weight,) = (p for n, p in method.model.net.named_parameters() if n.startswith("label"))
    assert bool(weight.grad[3].any()) is (dropout > 0)
    assert weight.grad[:3].any()
    settings = TrainerSettings(steps=4, batch_size=16, optim=OptimizerSettings(name="adam"))
    trained = Trainer(TextReflow(start, Independent(labels()), condition_dropout=dropout),
                      settings).fit()  # fmt: skip
    (after,) = (p for n, p in trained.net.named_parameters() if n.startswith("label"))
    (before,) = (p for n, p in start.net.named_parameters() if n.startswith("label"))
    assert torch.equal(after[3], before[3]) is (dropout == 0)


def test_refusals() -> None:
    curved = FlowModel(MLP(shape=(2,), width=4, depth=1), VariancePreservingPath())
    with pytest.raises(ValueError, match="on the rectified path, got 'vp': read the pipeline"):
        TextReflow(curved, Independent(labels()))
    method = TextReflow(model(), Independent(torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="needs pairs with a condition, got none"):
        method.loss(Draw.of(4))


def test_more_steps_than_a_student_was_made_for() -> None:
    student = OneStepDistillation(model(), Independent(labels()), steps=2).model.eval()
    x = torch.zeros(2, 2)
    sample(student, source=x, steps=2)
    sample(student, source=x, steps=1)
    with pytest.warns(UserWarning, match="distilled to 2 steps and is sampled with 4"):
        sample(student, source=x, steps=4)
    with pytest.warns(UserWarning, match="distilled to 2 steps and is sampled with 3"):
        sample(student, source=x, steps=[0, 0.2, 0.5, 1])
