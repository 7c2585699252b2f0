"""Chains: the order of parts, one direction rule, one kernel, gradients as wholes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rectiflow.optim import (
    AdAdaGradNorm,
    Adam,
    CentreGradients,
    ChainedOptimizer,
    ClipNorm,
    DiffGrad,
    Friction,
    Momentum,
    SophiaG,
    SplitSGD,
    chain,
)
from rectiflow.optim.buckets import BLOCK, Bucket


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_parts_are_applied_in_the_documented_order() -> None:
    """Clip, add the decay, average, rub, step: by hand."""
    p = nn.Parameter(draw(6))
    optimizer = chain(Momentum(0.5), Friction(), ClipNorm(0.7))(
        [p], lr=0.1, weight_decay=0.2, decoupled=False
    )
    weight, memory, before = p.detach().clone(), None, torch.zeros(6, dtype=torch.float64)
    for seed in range(3):
        grad = draw(6, seed=seed)
        p.grad = grad.clone()
        optimizer.step()
        grad = grad * min(1, 0.7 / (float(grad.norm()) + 1e-6)) + 0.2 * weight
        memory = grad if memory is None else 0.5 * memory + grad
        weight = weight - 0.1 * torch.sigmoid((before - grad).abs()) * memory
        before = grad
        torch.testing.assert_close(p.detach(), weight, rtol=1e-12, atol=1e-14)


def test_a_chain_has_one_rule_and_known_settings() -> None:
    p = nn.Parameter(draw(2))
    with pytest.raises(ValueError, match="one direction rule, got 2"):
        ChainedOptimizer([p], [Adam(), Momentum()], lr=0.1)
    with pytest.raises(ValueError, match="one direction rule, got 0"):
        ChainedOptimizer([p], [Friction()], lr=0.1)
    with pytest.raises(ValueError, match="no part of the chain knows the setting 'beta'"):
        chain(Adam())([p], lr=0.1, beta=0.9)
    assert chain(Adam())([p], lr=0.1, eps=1e-3).param_groups[0]["eps"] == 1e-3


def test_centred_gradients_have_rows_of_mean_zero() -> None:
    p, q = nn.Parameter(draw(3, 2, 2)), nn.Parameter(draw(4))
    optimizer = chain(Momentum(0.0), CentreGradients())([p, q], lr=1.0)
    before = p.detach().clone(), q.detach().clone()
    p.grad, q.grad = draw(3, 2, 2, seed=1), draw(4, seed=2)
    optimizer.step()
    moved = before[0] - p.detach()
    wanted = p.grad - p.grad.mean((1, 2), keepdim=True)
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(before[1] - q.detach(), q.grad, rtol=1e-12, atol=1e-14)


def test_invariant_7_adagrad_norm_turns_with_its_weights() -> None:
    rotation = torch.linalg.qr(draw(5, 5)).Q
    p, q = nn.Parameter(draw(5)), nn.Parameter(rotation @ draw(5))
    first, second = AdAdaGradNorm([p]), AdAdaGradNorm([q])
    for seed in range(5):
        p.grad = draw(5, seed=seed)
        q.grad = rotation @ p.grad
        first.step()
        second.step()
    torch.testing.assert_close(rotation @ p.detach(), q.detach(), rtol=1e-10, atol=1e-12)
    given = first.state_dict()["param_groups"][0]["sum_of_squares"]
    kept = float(given)
    p.grad = draw(5)
    first.step()
    assert float(given) == kept


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_split_steps_have_their_limits(fraction) -> None:
    p, q = nn.Parameter(draw(9)), nn.Parameter(draw(9))
    ours = SplitSGD([p], lr=0.1, fraction=fraction, ratio=0.5)
    for seed in range(4):
        before = p.detach().clone()
        p.grad = draw(9, seed=seed)
        ours.step()
        memory = ours.state[p]["momentum_buffer"]
        wanted = memory if fraction == 0 else 0.5 * memory.sign()
        torch.testing.assert_close(before - p.detach(), 0.1 * wanted, rtol=1e-12, atol=1e-14)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction must be in"):
            SplitSGD([q], fraction=wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda p, c: DiffGrad(p, weight_decay=0.1, compile=c),
        lambda p, c: DiffGrad(p, weight_decay=0.1, decoupled=True, maximize=True, compile=c),
        lambda p, c: SophiaG(p, compile=c),
        lambda p, c: SplitSGD(p, compile=c),
        lambda p, c: chain(Adam(amsgrad=True, nesterov=True), ClipNorm(0.5))(p, lr=0.1, compile=c),
    ],
    ids=["DiffGrad", "upward", "Sophia", "split", "clipped Adam"],
)
def test_one_kernel_computes_the_same(make, monkeypatch) -> None:
    """The compiled form, traced as it is for a compiler, without waiting for one."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, **{**options, "backend": "aot_eager"})
    )
    shapes = [(4, 3), (70_000,), ()]
    a = [nn.Parameter(draw(*s, seed=i).float()) for i, s in enumerate(shapes)]
    b = [nn.Parameter(p.detach().clone()) for p in a]
    ours, eager = make(a, True), make(b, False)
    for step in range(3):
        for place, (p, q) in enumerate(zip(a, b)):
            p.grad = draw(*shapes[place], seed=10 * step + place).float()
            q.grad = p.grad.clone()
        ours.step()
        eager.step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_blocks_cover_every_weight_once() -> None:
    sizes = [5, 0, BLOCK // 2 - 1, BLOCK // 2, 3 * BLOCK + 7, 1, 2, BLOCK]
    bucket = Bucket([nn.Parameter(torch.zeros(size)) for size in sizes])
    seen = torch.zeros(sum(sizes), dtype=torch.int64)
    flats = {i: torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    for block in bucket.blocks(range(len(sizes))):
        seen[block.start : block.stop] += 1
        assert block.stop - block.start <= BLOCK
        piece = bucket.piece(flats, block)
        owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        assert torch.equal(piece, owners[block.start : block.stop].float())
    assert (seen == 1).all()


def test_units_are_neighbours_cut_when_they_fill_a_block() -> None:
    sizes = [5, BLOCK // 2, BLOCK, 1, 2 * BLOCK, 3, 4, 7]
    bucket = Bucket([nn.Parameter(torch.zeros(size)) for size in sizes])
    assert bucket.units(range(8)) == [[0, 1, 2], [3, 4], [5, 6, 7]]
    # What has no gradient cuts, too.
    assert bucket.units([0, 2, 3, 7]) == [[0], [2], [3], [7]]
