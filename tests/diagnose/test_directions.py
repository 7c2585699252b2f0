"""Directional sharpness and landscapes against Hessians written out and quadratics."""

from __future__ import annotations

import math

import pytest
import torch
from tests.diagnose.tiny import classifier, data, dense, loss_of, net, randoms
from torch import nn
from torch.nn import functional

from rectiflow.diagnose import (
    best_step,
    curvature_by_losses,
    directional_sharpness,
    heavy_coordinates,
    landscape,
    top_eigenpair,
)
from rectiflow.diagnose.hessian import Hessian


def quadratic(size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A positive matrix A and weights w of the loss w'Aw / 2, and a direction that slopes."""
    root = randoms(size * size).view(size, size)
    matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
    w = randoms(size, seed=3).requires_grad_()
    return matrix, w, (matrix @ w.detach()).sign()


def test_against_the_matrix_written_out() -> None:
    model, (x, y) = classifier(), data()
    matrix = dense(model, lambda answer: functional.cross_entropy(answer(x), y))
    gradient = Hessian(loss_of(model), model.parameters(), [(x, y)]).gradient()

    def found(v):
        return directional_sharpness(loss_of(model), model.parameters(), v, [(x, y)], module=model)

    v = randoms(35)
    seen = found(v)
    # Rounding of float64.
    assert seen.sharpness == pytest.approx(float(v @ matrix @ v / (v @ v)), rel=1e-12)
    assert seen.correlation == pytest.approx(float(gradient @ v / v.norm()), rel=1e-12)
    assert seen.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert seen.cosine == pytest.approx(float(functional.cosine_similarity(gradient, v, 0)))
    assert found(-40 * v).sharpness == pytest.approx(seen.sharpness, rel=1e-12)
    assert found(-40 * v).correlation == pytest.approx(-seen.correlation, rel=1e-12)
    for i in (0, 17, 34):
        e = torch.zeros(35, dtype=torch.float64)
        e[i] = 1
        assert found(e).sharpness == pytest.approx(float(matrix[i, i]), abs=1e-13)
    parts = Hessian(loss_of(model), model.parameters(), [(x, y)]).unflatten(v)
    assert found(parts).sharpness == pytest.approx(seen.sharpness, rel=1e-12)
    top = top_eigenpair(
        Hessian(loss_of(model), model.parameters(), [(x, y)]),
        tolerance=1e-7,
        generator=torch.Generator().manual_seed(0),
    )
    assert found(top.vector).sharpness == pytest.approx(
        float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-9
    )


def test_best_step_of_a_quadratic() -> None:
    matrix, w, v = quadratic()

    def loss(a):
        return w @ a @ w / 2

    seen = directional_sharpness(loss, [w], v, [matrix])
    assert seen.best_distance == pytest.approx(seen.correlation / seen.sharpness)
    start = float(loss(matrix).detach())
    for reach in (1e-3 * seen.best_distance, 2 * seen.best_distance, 1e3 * seen.best_distance):
        found = best_step(loss, [w], v, [matrix], reach=reach)
        cell = found.distances[0]
        assert abs(found.best_distance - seen.best_distance) <= cell
        # Half a cell off, the fall is short by S cell² / 8 at most.
        assert 0 <= seen.best_decrease - found.best_decrease <= seen.sharpness * cell**2 / 8 + 1e-12
        assert cell < seen.best_distance / 2
        assert found.start == start
    line = landscape(loss, [w], v, [matrix], [0.5, 1.0])
    unit = v / v.norm()
    for distance, value in zip(line.distances, line.losses):
        moved = w.detach() - distance * unit
        assert value == pytest.approx(float(moved @ matrix @ moved / 2), rel=1e-12)


def test_directions_that_do_not_fall() -> None:
    w = torch.tensor([1.0, 1.0], requires_grad=True)

    def saddle(_):
        return w[0] ** 2 - w[1] ** 2

    up = directional_sharpness(saddle, [w], torch.tensor([0.0, 1.0]), [None])
    assert up.sharpness == -2
    assert math.isinf(up.best_distance)
    assert math.isinf(up.best_decrease)
    worse = landscape(saddle, [w], torch.tensor([-1.0, 0.0]), [None], [0.1, 0.2, 0.3], stop=True)
    assert worse.distances == (0.1,)
    assert worse.best_distance == worse.best_decrease == 0
    blocked = best_step(saddle, [w], torch.tensor([-1.0, 0.0]), [None], reach=1.0, rounds=3)
    assert blocked.best_decrease == 0


def test_curvature_by_three_losses() -> None:
    matrix, w, v = quadratic()

    def loss(a):
        return w @ a @ w / 2

    exact = directional_sharpness(loss, [w], v, [matrix]).sharpness
    # Cancellation of losses of order 10 at moves of order 1e-2.
    assert curvature_by_losses(loss, [w], [1e-2 * v], [matrix]) == pytest.approx(exact, rel=1e-8)


def test_weights_modes_and_gradients_are_left_as_they_were() -> None:
    model = net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    batch = data()
    loss_of(model)(batch).backward()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    drawn = torch.get_rng_state()
    v = randoms(39)
    arguments = (loss_of(model), list(model.parameters()), v, [batch])
    directional_sharpness(*arguments, module=model)
    landscape(*arguments, [0.1, 1e6], module=model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, [p.grad for p in model.parameters()], grads))
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_weights_are_put_back_after_an_error() -> None:
    w = torch.tensor([3.0], requires_grad=True)

    def loss(_):
        if float(w.detach()) != 3:
            raise RuntimeError("no")
        return w.sum()

    with pytest.raises(RuntimeError, match="no"):
        landscape(loss, [w], torch.ones(1), [None], [1.0])
    assert w.tolist() == [3]


def test_refusals() -> None:
    w = torch.ones(2, requires_grad=True)
    some = (lambda _: w.sum(), [w])
    with pytest.raises(ValueError, match="finite and > 0"):
        directional_sharpness(*some, torch.zeros(2), [None])
    with pytest.raises(ValueError, match="2 weights has that many numbers"):
        directional_sharpness(*some, torch.ones(3), [None])
    with pytest.raises(ValueError, match="one distance or more"):
        landscape(*some, torch.ones(2), [None], [])
    with pytest.raises(ValueError, match="reach must be > 0 and finite"):
        best_step(*some, torch.ones(2), [None], reach=math.inf)


def test_heavy_coordinates() -> None:
    gradients = {"a": torch.tensor([[4.0, 1.0], [0.0, 2.0]]), "b": torch.tensor([-3.0, 0.5])}
    found = heavy_coordinates(gradients, 0.34)
    assert found.threshold == 2
    assert found.shares == {"a": 0.25, "b": 0.5}
    assert found.energy == pytest.approx(25 / 30.25)
    assert heavy_coordinates({"a": torch.zeros(4)}).energy == 0
    with pytest.raises(ValueError, match="fraction"):
        heavy_coordinates(gradients, 1.0)
