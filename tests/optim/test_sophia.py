"""Sophia: signs without curvature, Newton with it, unbiased estimates, quiet refreshes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from rectiflow.optim import (
    SophiaG,
    SophiaH,
    empirical_fisher,
    hutchinson,
    sampled_cross_entropy,
    sampled_squared_error,
    statistics_kept,
)


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sophia(p, **options) -> SophiaG:
    return SophiaG([p], **{"lr": 0.1, "weight_decay": 0.0, **options})


def test_invariant_1_without_curvature_steps_are_signs() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = sophia(p)
    p.grad = torch.tensor([2.0, -1e-3, 0.0, 5.0], dtype=torch.float64)
    optimizer.step()
    assert torch.equal(p.detach(), -0.1 * p.grad.sign())


def test_invariant_2_large_curvature_gives_the_ratio_and_no_step_exceeds_one() -> None:
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = sophia(p, betas=(0.9, 0.99), gamma=0.5)
    p.grad = draw(50)
    optimizer.step()
    assert p.detach().abs().max() <= 0.1 * (1 + 1e-12)
    optimizer.state[p]["hessian"].fill_(1e3)
    before = p.detach().clone()
    optimizer.step()
    mean = optimizer.state[p]["exp_avg"]
    torch.testing.assert_close(p - before, -0.1 * mean / 500, rtol=1e-12, atol=1e-16)
    assert optimizer.win_rate() == 1.0


def test_invariant_3_exact_curvature_is_newtons_step() -> None:
    scale, centre = (
        torch.tensor([0.5, 8.0, 100.0]).double(),
        torch.tensor([0.3, -0.2, 0.1]).double(),
    )
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SophiaH([p], lr=1.0, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0, interval=1)

    def loss():
        return 0.5 * (scale * (p - centre).square()).sum()

    optimizer.refresh(loss)
    loss().backward()
    optimizer.step()
    torch.testing.assert_close(p.detach(), centre, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2])
def test_invariant_4_drawn_labels_give_the_gauss_newton_diagonal(count, monkeypatch) -> None:
    """All ways to draw labels, weighted by their probability, for a linear softmax model."""
    x, w = draw(count, 3, seed=1), nn.Parameter(draw(3, 4, seed=2))
    probabilities = (x @ w).softmax(-1).detach()
    mean = torch.zeros_like(w)
    for labels in itertools.product(range(4), repeat=count):
        weight = math.prod(float(probabilities[i, k]) for i, k in enumerate(labels))
        drawn = iter([torch.tensor(labels)[:, None]])
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn, **__: next(drawn))
        optimizer = sophia(w, betas=(0.9, 0.0))
        optimizer.refresh(lambda: sampled_cross_entropy(x @ w))
        mean += weight * optimizer.state[w]["hessian"]
    curvature = torch.stack([torch.diag(q) - torch.outer(q, q) for q in probabilities])
    diagonal = torch.einsum("bi,bkk->bik", x.square(), curvature).mean(0)
    torch.testing.assert_close(mean, diagonal, rtol=1e-10, atol=1e-12)


def test_labels_of_the_data_give_the_empirical_fisher() -> None:
    x, w, labels = draw(6, 3, seed=1), nn.Parameter(draw(3, 4, seed=2)), torch.arange(6) % 4
    optimizer = sophia(w, betas=(0.9, 0.0))
    optimizer.refresh(lambda: empirical_fisher((x @ w).view(2, 3, 4), labels.view(2, 3)))
    away = (x @ w).softmax(-1) - nn.functional.one_hot(labels, 4)
    wanted = 6 * (x.T @ away / 6).square()
    torch.testing.assert_close(optimizer.state[w]["hessian"], wanted.detach())


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_eps_may_be_added_as_in_the_official_code(kind) -> None:
    p = nn.Parameter(draw(5))
    optimizer = kind([p], lr=0.1, gamma=0.5, eps=0.3, eps_mode="add", weight_decay=0.0)
    before, p.grad = p.detach().clone(), draw(5, seed=1)
    optimizer.state[p]["hessian"].copy_(h := torch.tensor([0.0, 0.01, 2.0, -0.5, 0.1]).double())
    optimizer.step()
    mean = 0.04 * p.grad
    ratio = (mean.abs() / (0.5 * h.clamp(min=0) + 0.3)).clamp(max=1)
    torch.testing.assert_close(p - before, -0.1 * mean.sign() * ratio)
    with pytest.raises(ValueError, match="unknown eps mode 'both'"):
        kind([p], eps_mode="both")


def test_invariant_4_so_do_drawn_residuals_for_squared_errors() -> None:
    x, w = draw(6, 3, seed=1), nn.Parameter(draw(3, 2, seed=2))
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(4000):
        loss, count = sampled_squared_error(x @ w, generator=generator)
        (grad,) = torch.autograd.grad(loss, w)
        estimates.append(count * grad.square())
    found = torch.stack(estimates)
    # Of mean((x w - y)²): 2 / n a row and output, n = 2.
    wanted = x.square().mean(0)[:, None].expand(3, 2)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() < 4 * error).all()


def test_labels_are_drawn_from_the_model() -> None:
    logits = torch.tensor([0.0, math.log(3.0)]).expand(20_000, 2).clone().requires_grad_()
    loss, count = sampled_cross_entropy(logits, generator=torch.Generator().manual_seed(0))
    loss.backward()
    # The gradient of a row is p - onehot, over the number of rows.
    share = float((logits.grad[:, 1] < 0).float().mean())
    assert count == 20_000
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / count) ** 0.5)


def test_invariant_5_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    diagonal = draw(7, seed=3)
    w = nn.Parameter(draw(7))
    (found,) = hutchinson(0.5 * (diagonal * w.square()).sum(), [w])
    torch.testing.assert_close(found, diagonal, rtol=1e-12, atol=0)
    full = draw(7, 7, seed=4)
    full = full + full.T
    (many,) = hutchinson(
        0.5 * w @ full @ w,
        [w],
        probe="normal",
        samples=10_000,
        generator=torch.Generator().manual_seed(0),
    )
    # Var(u_i sum_j H_ij u_j) = sum_j H_ij² + H_ii² for normal u.
    error = ((full.square().sum(1) + full.diag().square()) / 10_000).sqrt()
    assert ((many - full.diag()).abs() < 4 * error).all()


def test_weights_out_of_sight_have_no_curvature() -> None:
    seen, straight, unseen = (nn.Parameter(draw(2, seed=s)) for s in range(3))
    loss = seen.square().sum() + 3 * straight.sum()
    found = hutchinson(loss, [seen, straight, unseen])
    assert [f.tolist() for f in found] == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_invariant_6_the_released_form_is_the_papers() -> None:
    """rho (bs h) with unscaled h is gamma h with h times bs."""
    p, bs, rho = nn.Parameter(draw(5)), 32, 0.04
    optimizer = sophia(p, gamma=rho, betas=(0.9, 0.5))
    grad = draw(5, seed=1)
    optimizer.refresh(lambda: ((p * grad).sum(), bs))
    h = 0.5 * grad.square()
    torch.testing.assert_close(optimizer.state[p]["hessian"], bs * h, rtol=1e-6, atol=0)
    p.grad = draw(5, seed=2)
    before = p.detach().clone()
    optimizer.step()
    m = 0.1 * p.grad
    ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
    torch.testing.assert_close(p - before, -0.1 * m.sign() * ratio, rtol=1e-6, atol=1e-12)


def test_invariant_7_units_of_a_coordinate_do_not_matter() -> None:
    ends = []
    for unit in (1.0, 50.0):
        p = nn.Parameter(torch.tensor([1.0 / unit], dtype=torch.float64))
        optimizer = SophiaH([p], lr=0.2 / unit, weight_decay=0.0, gamma=2.0, interval=1)
        # Inside the clip the step is m / (gamma h), which turns with the unit as the weight does.
        optimizer.param_groups[0]["lr"] = 0.2
        for _ in range(5):
            optimizer.refresh(lambda p=p, unit=unit: 0.5 * 300 * (unit * p).square().sum())
            optimizer.zero_grad()
            (0.5 * 300 * (unit * p).square().sum()).backward()
            optimizer.state[p]["hessian"].fill_(300 * unit**2)
            optimizer.step()
        ends.append(float(p) * unit)
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


def test_invariant_8_micro_batches_are_one_batch() -> None:
    x, labels = draw(8, 3), torch.arange(8) % 4
    a, b = nn.Parameter(draw(3, 4, seed=1)), nn.Parameter(draw(3, 4, seed=1))

    def closure(w, rows):
        return lambda: (nn.functional.cross_entropy(x[rows] @ w, labels[rows]), len(labels[rows]))

    whole, parts = sophia(a), sophia(b)
    whole.refresh(closure(a, slice(0, 8)))
    parts.refresh(*(closure(b, slice(i, i + 2)) for i in range(0, 8, 2)))
    torch.testing.assert_close(
        whole.state[a]["hessian"], parts.state[b]["hessian"], rtol=1e-5, atol=1e-9
    )
    c, d = nn.Parameter(draw(3, seed=1)), nn.Parameter(draw(3, seed=1))
    one, two = SophiaH([c], interval=1), SophiaH([d], interval=1)
    one.refresh(lambda: (c**4).sum())
    two.refresh(lambda: (d**4).sum() * 0.5, lambda: (d**4).sum() * 1.5)
    torch.testing.assert_close(one.state[c]["hessian"], two.state[d]["hessian"])


def test_invariant_9_refreshes_go_on_after_loading() -> None:
    p = nn.Parameter(draw(3))
    first = sophia(p, interval=4)
    due = []
    for _ in range(6):
        due.append(first.due)
        p.grad = draw(3)
        first.step()
    assert due == [True, False, False, False, True, False]
    q = nn.Parameter(p.detach().clone())
    second = sophia(q, interval=4)
    second.load_state_dict(first.state_dict())
    due = []
    for _ in range(4):
        due.append(second.due)
        q.grad = draw(3)
        second.step()
    assert due == [False, False, True, False]


def test_invariant_10_a_refresh_disturbs_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = SophiaG(model.parameters())
    x = torch.randn(6, 3)
    model(x).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    with statistics_kept(model):
        optimizer.refresh(lambda: sampled_cross_entropy(model(x), generator=generator))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert all(torch.equal(b, kept) for b, kept in zip(model.buffers(), buffers))
    assert torch.equal(torch.get_rng_state(), state)
    assert optimizer.state[model[0].weight]["hessian"].abs().sum() > 0


def test_upward_is_downward_of_the_negative_with_curvature() -> None:
    ends = []
    for sign in (1, -1):
        p = nn.Parameter(draw(6))
        optimizer = SophiaH([p], lr=0.1, gamma=1.0, maximize=sign < 0)

        def loss(p=p, sign=sign):
            return sign * (torch.arange(1.0, 7.0) * (p**4 - p.square())).sum()

        for seed in range(5):
            optimizer.refresh(loss, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        ends.append((p.detach(), optimizer.state[p]["hessian"]))
    assert torch.equal(*(weight for weight, _ in ends))
    assert torch.equal(*(curvature for _, curvature in ends))
    assert optimizer.win_rate() > 0


def test_clipping_the_drawn_gradient_makes_curvature_smaller() -> None:
    p = nn.Parameter(draw(3))
    optimizer = sophia(p, betas=(0.9, 0.0))
    optimizer.refresh(lambda: (10 * p.sum(), 1), clip_norm=1.0)
    torch.testing.assert_close(
        optimizer.state[p]["hessian"], torch.full((3,), 1 / 3).double(), rtol=1e-5, atol=0
    )


def test_bad_settings_are_refused() -> None:
    p = nn.Parameter(draw(2))
    for wrong, message in (
        ({"gamma": 0.0}, "gamma must be > 0"),
        ({"interval": 0}, "interval must be > 0"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sophia(p, **wrong)
    with pytest.raises(ValueError, match="a closure for each micro-batch"):
        sophia(p).refresh()
    with pytest.raises(ValueError, match="unknown probe 'gauss'"):
        SophiaH([p], probe="gauss")
    with pytest.raises(ValueError, match="samples must be > 0"):
        SophiaH([p], samples=0)
    with pytest.raises(ValueError, match="unknown probe 'gauss'"):
        hutchinson(p.square().sum(), [p], probe="gauss")
