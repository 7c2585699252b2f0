"""Hessian-vector products against Hessians written out; the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from tests.diagnose.tiny import classifier, data, dense, loss_of, net, randoms
from torch import nn
from torch.nn import functional

from rectiflow.diagnose import Hessian
from rectiflow.optim import apply_tract


def whole(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return dense(model, lambda answer: functional.cross_entropy(answer(x), y))


def test_products_are_those_of_the_matrix_written_out() -> None:
    model, (x, y) = classifier(), data()
    matrix, v = whole(model, x, y), randoms(35)
    hessian = Hessian(loss_of(model), model.parameters(), [(x, y)])
    assert len(hessian) == len(matrix) == 35
    # Rounding of float64 in a few dozen operations; the second product uses the kept graph.
    for vector in (v, v.flip(0)):
        assert torch.allclose(hessian @ vector, matrix @ vector, rtol=0, atol=1e-13)


def test_batches_are_averaged() -> None:
    model, (x, y) = classifier(), data()
    one = Hessian(loss_of(model), model.parameters(), [(x, y)])
    halves = Hessian(loss_of(model), model.parameters(), [(x[:6], y[:6]), (x[6:], y[6:])])
    v = randoms(35)
    assert torch.allclose(one @ v, halves @ v, rtol=0, atol=1e-14)
    assert torch.allclose(one.gradient(), halves.gradient(), rtol=0, atol=1e-14)
    assert one.value() == pytest.approx(halves.value(), abs=1e-14)
    loss_of(model)((x, y)).backward()
    slopes = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert torch.allclose(one.gradient(), slopes, rtol=0, atol=1e-15)


def test_weights_that_do_not_bend_the_loss() -> None:
    used, linear, unused = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(3))
    hessian = Hessian(lambda _: used[0] ** 3 + linear.sum(), [unused, used, linear], [None])
    assert (hessian @ torch.ones(6)).tolist() == [0, 0, 6, 0, 0, 0]
    assert hessian.gradient().tolist() == [0, 0, 3, 0, 1, 1]
    flat = Hessian(lambda _: linear.sum(), [linear], [None])
    assert (flat @ torch.ones(2)).tolist() == [0, 0]


def test_batch_statistics_are_those_of_training() -> None:
    x, y = data()
    model = net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.Dropout(0.5))
    model.train()
    model[4].eval()
    # Without running statistics the matrix can be differentiated functionally.
    model[1].track_running_stats = False
    matrix = whole(model, x, y)
    model[1].track_running_stats = True
    model[4].train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    loss = loss_of(model)
    hessian = Hessian(loss, model.parameters(), [(x, y)], module=model, batch_statistics=True)
    v = randoms(len(matrix))
    # Twice: a graph that saved a buffer must survive that buffers are given back.
    for vector in (v, -v):
        assert torch.allclose(hessian @ vector, matrix @ vector, rtol=0, atol=1e-12)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model[1].track_running_stats
    running = Hessian(loss, model.parameters(), [(x, y)], module=model)
    assert not torch.allclose(running @ v, matrix @ v, atol=1e-3)
    assert torch.allclose(running @ v, running @ v)


def test_model_and_random_numbers_are_left_as_they_were() -> None:
    model, batch = net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)), data()
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [part.training for part in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()

    def loss(given):
        torch.rand(3)
        return loss_of(model)(given)

    first, second = (
        Hessian(loss, model.parameters(), [batch, batch], module=model) @ randoms(39)
        for _ in range(2)
    )
    assert torch.equal(first, second), "dropout is off"
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_state_is_given_back_after_an_error() -> None:
    model = net(nn.Linear(3, 3), nn.Dropout()).train()

    def loss(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Hessian(loss, model.parameters(), [None], module=model).gradient()
    assert model.training
    assert model[1].training


def test_attention_has_a_second_derivative() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False).double()

        def forward(self, x):
            q, k, v = self.qkv(x).view(1, 5, 3, 1, 4).permute(2, 0, 3, 1, 4)
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()

    model, x = Attention(), randoms(20).view(1, 5, 4)
    hessian = Hessian(model, model.parameters(), [x])
    v, step = randoms(48), 1e-4
    weight = model.qkv.weight

    def slope(sign: float) -> torch.Tensor:
        with torch.no_grad():
            weight.add_(v.view_as(weight), alpha=sign * step)
        found = Hessian(model, [weight], [x]).gradient()
        with torch.no_grad():
            weight.sub_(v.view_as(weight), alpha=sign * step)
        return found

    # Central differences are off by their third derivative times the squared step.
    difference = (slope(1) - slope(-1)) / (2 * step)
    assert torch.allclose(hessian @ v, difference, rtol=0, atol=1e-6)


def test_autocast_does_not_reach_in() -> None:
    model, batch = classifier().float(), data()
    batch = (batch[0].float(), batch[1])
    v = randoms(35).float()
    plain = Hessian(loss_of(model), model.parameters(), [batch]) @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Hessian(loss_of(model), model.parameters(), [batch]) @ v
    assert torch.equal(plain, mixed)


def test_compiled_networks_run_uncompiled() -> None:
    model, batch = classifier(), data()
    v = randoms(35)
    plain = Hessian(loss_of(model), model.parameters(), [batch]) @ v
    # Ahead-of-time graphs have no second derivative.
    model.compile(backend="aot_eager")
    found = Hessian(loss_of(model), model.parameters(), [batch], module=model) @ v
    assert torch.equal(plain, found)


@pytest.mark.parametrize("form", ["backward", "graph"])
def test_the_first_layer_is_looked_at_without_tract(form) -> None:
    model, batch = classifier(), data()
    v = randoms(35)
    plain = Hessian(loss_of(model), model.parameters(), [batch])
    product, slope = plain @ v, plain.gradient()
    apply_tract(model, form=form)
    found = Hessian(loss_of(model), model.parameters(), [batch], module=model)
    assert torch.equal(found @ v, product)
    assert torch.equal(found.gradient(), slope)


def test_refusals() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="one weight or more"):
        Hessian(lambda _: w.sum(), [], [None])
    with pytest.raises(ValueError, match="one batch or more"):
        Hessian(lambda _: w.sum(), [w], [])
    with pytest.raises(ValueError, match=r"got torch\.bfloat16"):
        Hessian(lambda _: w.sum(), [w.detach().bfloat16().requires_grad_()], [None])
    with pytest.raises(ValueError, match="require a gradient"):
        Hessian(lambda _: w.sum(), [w.detach()], [None])
    with pytest.raises(ValueError, match="2 weights takes vectors of that length"):
        Hessian(lambda _: w.sum(), [w], [None]) @ torch.ones(3)
