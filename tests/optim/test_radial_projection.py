"""Radial projection: what it removes, from which weights, and what it leaves alone."""

from __future__ import annotations

import adamp
import pytest
import torch
from torch import nn

from rectiflow.optim import SGDP, AdamP, Momentum, RadialProjection, chain
from rectiflow.optim.buckets import BLOCK


def draw(*shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(grad: torch.Tensor, weight: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """The gradient without its part along the weight, by row or as a whole."""
    g, w = (x.reshape(len(x) if rows else 1, -1) for x in (grad, weight))
    along = (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    return (g - along * w).reshape(grad.shape)


def step(optimizer, p, grad) -> torch.Tensor:
    """The change of a weight in a step."""
    before = p.detach().clone()
    p.grad = grad
    optimizer.step()
    return p.detach() - before


@pytest.mark.parametrize("kind", ["SGDP", "AdamP"])
def test_invariant_1_the_step_is_orthogonal_to_decayed_weights_by_row(kind) -> None:
    p = nn.Parameter(draw(6, 5))
    make = {"SGDP": lambda: SGDP([p], lr=0.1, momentum=0.9), "AdamP": lambda: AdamP([p], lr=0.1)}
    optimizer = make[kind]()
    for seed in range(1, 6):
        before = p.detach().clone()
        change = step(optimizer, p, orthogonal(draw(6, 5, seed=seed), before, rows=True))
        inner = (change * before).sum(1)
        assert inner.abs().max() < 1e-7 * change.norm()


def test_invariant_2_norms_grow_by_pythagoras_alone() -> None:
    p = nn.Parameter(draw(4, 7))
    optimizer = SGDP([p], lr=0.1, momentum=0.9)
    for seed in range(1, 8):
        before = p.detach().clone()
        change = step(optimizer, p, orthogonal(draw(4, 7, seed=seed), before, rows=True))
        grown = p.detach().square().sum() - before.square().sum()
        torch.testing.assert_close(grown, change.square().sum(), rtol=1e-6, atol=1e-12)


def test_invariant_3_without_a_match_it_is_the_optimizer_inside() -> None:
    a, b = nn.Parameter(draw(6, 5)), nn.Parameter(draw(6, 5))
    c, d = nn.Parameter(draw(6, 5)), nn.Parameter(draw(6, 5))
    pairs = [
        (AdamP([a], lr=0.01, weight_decay=0.1), a,
         torch.optim.AdamW([b], lr=0.01, weight_decay=0.1), b),
        (SGDP([c], lr=0.01, momentum=0.9), c, torch.optim.SGD([d], lr=0.01, momentum=0.9), d),
    ]  # fmt: skip
    for ours, p, theirs, q in pairs:
        for seed in range(1, 20):
            # Along the weight: as far from scale-invariant as can be.
            grad = p.detach() + 0.1 * draw(6, 5, seed=seed)
            p.grad, q.grad = grad.clone(), grad.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_invariant_4_the_threshold_is_strict_and_may_force() -> None:
    flat = orthogonal(draw(3, 8, seed=1), draw(3, 8), rows=True)
    for settings, projected in (({"delta": 0.0}, False), ({"delta": 1e9}, True)):
        p = nn.Parameter(draw(3, 8))
        optimizer = SGDP([p], lr=1.0, momentum=0.9, weight_decay=0.0, **settings)
        step(optimizer, p, flat.clone())
        before = p.detach().clone()
        change = step(optimizer, p, before.clone() if settings["delta"] else flat.clone())
        radial = ((change * before).sum(1).abs().max() / change.norm()).item()
        assert (radial < 1e-6) == projected


def test_invariant_5_the_whole_tensor_is_tried_after_its_rows() -> None:
    p = nn.Parameter(draw(5, 9))
    grad = orthogonal(draw(5, 9, seed=3), p.detach(), rows=False)
    assert (grad * p.detach()).sum(1).abs().max() > 0.5
    before = p.detach().clone()
    optimizer = chain(Momentum(0.0), RadialProjection())([p], lr=1.0, weight_decay=0.5)
    change = step(optimizer, p, grad + 1e-3 * before)
    # A tenth of the decay, and nothing along the weight as a whole.
    torch.testing.assert_close((change * before).sum(), -0.05 * before.square().sum())
    assert ((change + 0.05 * before) * before).sum(1).abs().max() > 0.5


def test_invariant_6_vectors_are_never_projected() -> None:
    p, q = nn.Parameter(draw(5)), nn.Parameter(draw(5))
    first = SGDP([p], lr=0.1, momentum=0.9, delta=1e9)
    second = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for seed in range(4):
        grad = draw(5, seed=seed)
        step(first, p, grad.clone())
        step(second, q, grad.clone())
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_invariant_7_agrees_with_the_authors_package(nesterov) -> None:
    p, q = nn.Parameter(draw(6, 5)), nn.Parameter(draw(6, 5))
    options = {"lr": 0.05, "weight_decay": 0.1, "nesterov": nesterov}
    ours, theirs = AdamP([p], **options), adamp.AdamP([q], **options)
    for seed in range(6):
        grad = orthogonal(draw(6, 5, seed=seed), p.detach(), rows=seed % 2 == 0)
        step(ours, p, grad.clone())
        step(theirs, q, grad.clone())
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_invariant_7_memory_order_does_not_matter() -> None:
    value, changes = draw(4, 3, 3, 3), []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(value.to(memory_format=layout))
        optimizer = AdamP([p], lr=0.1, weight_decay=0.1)
        for seed in range(3):
            step(optimizer, p, orthogonal(draw(4, 3, 3, 3, seed=seed), p.detach(), rows=True))
        changes.append(p.detach().contiguous())
    torch.testing.assert_close(*changes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [SGDP, AdamP])
def test_weights_of_several_blocks_step_as_each_alone(kind, monkeypatch) -> None:
    monkeypatch.setattr("rectiflow.optim.buckets.BLOCK", 16)
    # Gradients without a radial part match, so that every weight is projected and decays less.
    together = [nn.Parameter(draw(6, 5, seed=n)) for n in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    settings = {"lr": 0.1, "weight_decay": 0.1, "wd_ratio": 0.5}
    one, many = kind(together, **settings), [kind([p], **settings) for p in alone]
    for seed in range(3, 6):
        for p, q, own in zip(together, alone, many):
            q.grad = p.grad = orthogonal(draw(6, 5, seed=seed), p.detach(), rows=True)
            own.step()
        one.step()
    for p, q in zip(together, alone):
        assert torch.equal(p, q)


@pytest.mark.parametrize("length", [3, 2 * BLOCK + 1], ids=["at once", "in blocks"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_and_memories_are_not_projected(momentum, length) -> None:
    p = nn.Parameter(draw(2, length))
    grad = draw(2, length, seed=1) + p.detach()
    rule = Momentum(momentum=momentum)
    optimizer = chain(rule, RadialProjection())([p], lr=1.0, projection="force")
    change = step(optimizer, p, grad.clone())
    torch.testing.assert_close(change, -orthogonal(grad, p.detach() - change, rows=True))
    assert torch.equal(p.grad, grad)
    if momentum:
        assert torch.equal(optimizer.state[p]["momentum_buffer"], grad)


def test_transposed_weights_are_taken_by_their_channels() -> None:
    value = draw(3, 6)
    p, q = nn.Parameter(value.clone()), nn.Parameter(value.T.contiguous())
    first = SGDP([{"params": [p], "channel_dim": 1}], lr=0.1, momentum=0.9)
    second = SGDP([q], lr=0.1, momentum=0.9)
    for seed in range(4):
        grad = orthogonal(draw(6, 3, seed=seed), q.detach(), rows=True)
        step(first, p, grad.T.contiguous())
        step(second, q, grad.clone())
    torch.testing.assert_close(p.T, q, rtol=1e-12, atol=1e-14)
    assert abs(float(p.norm() - value.norm())) > 1e-4


def test_invariant_8_projecting_twice_is_projecting_once() -> None:
    ends = []
    for times in (1, 2):
        p = nn.Parameter(draw(4, 5))
        parts = [RadialProjection(eps=0.0)] * times
        optimizer = chain(Momentum(0.9), *parts)([p], lr=0.1)
        for seed in range(3):
            step(optimizer, p, orthogonal(draw(4, 5, seed=seed), p.detach(), rows=True))
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_invariant_8_longer_weights_and_rates_walk_the_same_directions() -> None:
    """Scaling a scale-invariant weight by c and the rate by c squared changes its length alone."""
    target, ends = draw(1, 12, seed=9), []
    for scale in (1.0, 4.0):
        p = nn.Parameter(scale * draw(1, 12))
        optimizer = SGDP([p], lr=0.3 * scale**2, eps=0.0)
        for _ in range(20):
            optimizer.zero_grad()
            (-(p * target).sum() / p.norm()).backward()
            optimizer.step()
        ends.append(p.detach() / p.detach().norm())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_momentum_makes_norms_grow_about_nineteen_times_as_fast() -> None:
    """The paper's toy: a cosine, in 20 dimensions, 200 steps at rate 0.05."""
    target, grown = draw(1, 20, seed=4) / draw(1, 20, seed=4).norm(), {}
    for name, make in {
        "SGD": lambda p: torch.optim.SGD([p], lr=0.05, momentum=0.9),
        "SGDP": lambda p: SGDP([p], lr=0.05, momentum=0.9),
    }.items():
        p = nn.Parameter(draw(1, 20, seed=5) / draw(1, 20, seed=5).norm())
        optimizer = make(p)
        for _ in range(200):
            optimizer.zero_grad()
            (-(p * target).sum() / p.norm()).backward()
            optimizer.step()
        grown[name] = float(p.detach().square().sum()) - 1
        assert 1 - float(torch.cosine_similarity(p.detach(), target)) < 1e-7
    # 1 + 2 b / (1 - b) is 19 for steps of equal length; shorter weights take longer ones.
    assert 15 < grown["SGD"] / grown["SGDP"] < 45


def test_bad_settings_are_refused() -> None:
    p = nn.Parameter(draw(2, 2))
    with pytest.raises(ValueError, match="unknown projection 'always'"):
        SGDP([{"params": [p], "projection": "always"}])
    with pytest.raises(ValueError, match="delta must be >= 0"):
        AdamP([p], delta=-1.0)
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        SGDP([p], nesterov=True)
