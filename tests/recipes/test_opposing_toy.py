"""The toy of opposing signals: its formulas, its conservation law, its edge of stability."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.diagnose import Hessian, lanczos
from rectiflow.recipes.opposing_toy import Toy, ToySettings, descend, run_toy

TOY = Toy(torch.tensor([1.0, -2.0], dtype=torch.float64), 50.0, feature=3)


def weights(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, generator=generator, dtype=torch.float64)


def test_the_loss_is_that_of_the_data() -> None:
    generator, w = torch.Generator().manual_seed(0), weights()
    w[3:] *= 0.1
    # In expectation the loss has the constant E (|x_o|_1)² / (2 d) = variance d / 2.
    constant = 50.0 * 3 / 2
    inputs, target = TOY.sample(250_000, 0.3, generator=generator)
    losses = (TOY.answer(w, inputs) - target).square() / 2
    error = float(losses.std()) / 500
    assert abs(float(losses.mean()) - constant - float(TOY.loss(w))) < 3 * error
    assert error < 0.4
    assert float(inputs[:, :2].square().mean()) == pytest.approx(1, abs=0.01)
    # 75,000 samples hold a feature; its variance is known to some 0.3 %.
    assert float(inputs[:, 2:].square().mean()) == pytest.approx(50, rel=0.01)


def test_derivatives_are_those_of_autograd() -> None:
    w = weights()
    slope = torch.autograd.functional.jacobian(TOY.loss, w)
    bend = torch.autograd.functional.hessian(TOY.loss, w)
    assert torch.allclose(TOY.gradient(w), slope, rtol=0, atol=1e-12)
    assert torch.allclose(TOY.hessian(w), bend, rtol=0, atol=1e-12)
    batch = torch.stack([w, weights(1)])
    assert torch.equal(TOY.hessian(batch)[0], TOY.hessian(w))
    assert torch.allclose(TOY.gradient(batch)[1], TOY.gradient(batch[1]))
    # The engine of the diagnoses agrees with the closed form.
    p = w.clone().requires_grad_()
    found = lanczos(Hessian(lambda _: TOY.loss(p), [p], [None]).__matmul__, weights(2))
    assert found[0].value == pytest.approx(float(TOY.sharpness(w)), rel=1e-9)


def test_the_flow_keeps_what_it_should() -> None:
    w, step = weights(), 2.5e-4
    w[3:] *= 0.1
    before, loss = TOY.conserved(w), TOY.loss(w)
    for _ in range(600):
        slopes = [TOY.gradient(w)]
        for part in (0.5, 0.5, 1.0):
            slopes.append(TOY.gradient(w - part * step * slopes[-1]))
        w = w - step / 6 * (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + slopes[3])
    assert float((TOY.conserved(w) - before).abs()) < 1e-8
    assert float(TOY.loss(w)) < 0.5 * float(loss)


@pytest.mark.parametrize("product", [0.5, 1.9, 2.1, 3.0])
def test_the_feature_grows_exactly_above_the_edge(product: float) -> None:
    c, rate = 1.5, 0.01
    toy = Toy(torch.ones(1, dtype=torch.float64), product / (rate * c**2))
    path = descend(toy, torch.tensor([c, 0.1, 0.2], dtype=torch.float64), rate, 20, frozen=True)
    feature = path[:, 2]
    assert torch.allclose(feature[1:] / feature[:-1], torch.tensor(1 - product).double())
    assert (abs(float(feature[-1])) > 0.2) == (product > 2)


def test_opposing_samples_have_opposite_gradients() -> None:
    w = weights().requires_grad_()
    inputs, _ = TOY.sample(50, 1.0, generator=torch.Generator().manual_seed(0))
    mirrored = torch.cat([inputs[:, :2], -inputs[:, 2:]], 1)
    target = torch.linspace(-1, 1, 50, dtype=torch.float64)
    with torch.no_grad():
        w[3:] = 0
    slopes = [
        torch.autograd.grad((TOY.answer(w, x) - target).square().mean(), w)[0]
        for x in (inputs, mirrored)
    ]
    assert torch.equal(slopes[0][3:], -slopes[1][3:])
    assert torch.equal(slopes[0][:3], slopes[1][:3])


def test_numbers_of_the_specification() -> None:
    found = run_toy(ToySettings())
    descent, flow = found.sharpness["gradient descent"], found.sharpness["gradient flow"]
    assert descent[0] == pytest.approx(24.2, abs=0.05)
    assert descent[20] == pytest.approx(18.1, abs=0.05)
    assert descent[40] == pytest.approx(61, abs=0.5)
    assert descent[160] == pytest.approx(153.5, abs=0.05)
    assert min(flow) == pytest.approx(11.8, abs=0.05)
    assert flow.index(min(flow)) == 129
    assert flow[-1] == pytest.approx(153.96, abs=0.05)
    losses = found.losses["two layers"]
    assert losses[160] < 1e-5
    assert min(losses[:257]) < 1e-11
    assert max(range(100, 400), key=losses.__getitem__) == 257
    assert found.spike["two layers"] == pytest.approx(2.68, abs=0.01)
    assert descent[-1] == pytest.approx(130.1, abs=0.1)
    assert found.settled == pytest.approx(130.1 * 0.015 / 2, abs=1e-3)
    assert found.spike["no feature"] < 1e-4
    assert found.spike["one layer"] < 1e-4
    assert list(found.final.values()) == pytest.approx([54.1, 104.0, 154.0, 203.9], abs=0.06)
    assert found.linear > 0.9999
    assert math.isfinite(sum(losses))
