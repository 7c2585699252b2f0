"""Chains: the order of parts, one direction rule, one kernel, gradients as wholes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from rectiflow.optim import (
    SGDP,
    AdAdaGrad,
    AdAdaGradNorm,
    AdagradNorm,
    Adam,
    AdamP,
    CentreGradients,
    ChainedOptimizer,
    ClipCoordinates,
    ClipNorm,
    CoordinateClipped,
    DiffGrad,
    Friction,
    Momentum,
    RadialProjection,
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


def shortened(grad: torch.Tensor) -> torch.Tensor:
    return grad * min(1, 0.7 / (float(grad.norm()) + 1e-6))


def clipped(grad: torch.Tensor) -> torch.Tensor:
    """Two of eight coordinates are larger than what is left."""
    return grad.clamp(-(tau := grad.abs().sort(descending=True).values[2]), tau)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("up", [False, True])
def test_a_rectifier_looks_at_what_those_before_it_made(order, up) -> None:
    parts = [ClipNorm(0.7), ClipCoordinates(0.25)]
    p, grad = nn.Parameter(draw(8)), draw(8, seed=1)
    first, second = (parts[place] for place in order)
    optimizer = chain(Momentum(0.0), first, second)([p], lr=1.0, maximize=up)
    before, p.grad = p.detach().clone(), grad.clone()
    optimizer.step()
    steps = [shortened, clipped]
    wanted = steps[order[1]](steps[order[0]](grad))
    moved = p.detach() - before if up else before - p.detach()
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-14)
    other = steps[order[0]](steps[order[1]](grad))
    assert not torch.allclose(wanted, other)


def test_centred_rows_are_what_a_norm_is_taken_of() -> None:
    p, q = nn.Parameter(draw(3, 4)), nn.Parameter(draw(5))
    groups = [{"params": [p]}, {"params": [q]}]
    optimizer = chain(Momentum(0.0), CentreGradients(), ClipNorm(0.7))(groups, lr=1.0)
    before = p.detach().clone(), q.detach().clone()
    p.grad, q.grad = draw(3, 4, seed=1) + 2, draw(5, seed=2)
    optimizer.step()
    centred = p.grad - p.grad.mean(1, keepdim=True)
    factor = 0.7 / (float(torch.cat([centred.flatten(), q.grad]).norm()) + 1e-6)
    torch.testing.assert_close(before[0] - p.detach(), centred * factor)
    torch.testing.assert_close(before[1] - q.detach(), q.grad * factor)


def test_both_gradients_are_rectified() -> None:
    """What an earlier part gave to first moments is kept, and shortened like the whole."""
    p, grad = nn.Parameter(draw(8)), draw(8, seed=1)
    parts = ClipCoordinates(0.25, where="momentum"), ClipNorm(0.7)
    optimizer = chain(Adam(), *parts)([p], lr=0.1)
    p.grad = grad.clone()
    optimizer.step()
    factor = 0.7 / (float(grad.norm()) + 1e-6)
    state = optimizer.state[p]
    torch.testing.assert_close(state["exp_avg"], 0.1 * factor * clipped(grad))
    torch.testing.assert_close(state["exp_avg_sq"], 1e-3 * (factor * grad).square())


def test_parts_that_do_not_fit_are_refused() -> None:
    p = nn.Parameter(draw(3, 2))
    with pytest.raises(ValueError, match="takes one ClipNorm that looks at all gradients, got 2"):
        chain(Adam(), ClipNorm(1.0), ClipNorm(2.0))([p], lr=0.1)
    with pytest.raises(ValueError, match="the buffer of Momentum without nesterov"):
        chain(Adam(), RadialProjection(project_buffer=True))([p], lr=0.1)
    with pytest.raises(ValueError, match="the buffer of Momentum without nesterov"):
        chain(Momentum(nesterov=True), RadialProjection(project_buffer=True))([p], lr=0.1)
    with pytest.raises(ValueError, match="divides by Adam's mean of squares"):
        chain(Momentum(), Friction(relative=True))([p], lr=0.1)
    for parts in ([CentreGradients()], [RadialProjection()]):
        with pytest.raises(ValueError, match="needs whole tensors, which one kernel"):
            chain(Adam(), *parts)([p], lr=0.1, compile=True)
    with pytest.raises(ValueError, match="ClipCoordinates needs whole tensors"):
        CoordinateClipped([p], scope="tensor", compile=True)


def test_sharded_weights_are_refused(tmp_path) -> None:
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        p = nn.Parameter(distribute_tensor(draw(4), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="takes whole weights, got a sharded one"):
            AdamP([p])
    finally:
        distributed.destroy_process_group()


def test_a_nesterov_buffer_is_not_projected() -> None:
    """As in the official code, where the direction is then a tensor of its own."""
    p, q = (nn.Parameter(draw(4, 3)) for _ in range(2))
    plain = SGDP([p], momentum=0.9, nesterov=True)
    ours = SGDP([q], momentum=0.9, nesterov=True, project_buffer=True)
    for seed in range(3):
        for w in (p, q):
            w.grad = draw(4, 3, seed=seed)
            w.grad -= w.detach() * (w.grad * w.detach()).sum() / w.detach().square().sum()
        plain.step()
        ours.step()
    assert torch.equal(p, q)
    assert torch.equal(plain.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])


def test_states_of_torchs_optimizers_are_taken_over() -> None:
    pairs = (
        (partial(torch.optim.AdamW, lr=0.1), partial(AdamP, lr=0.1, weight_decay=1e-2, delta=0.0)),
        (
            partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
            partial(SGDP, lr=0.1, momentum=0.9, dampening=0.5, delta=0.0),
        ),
    )
    for theirs, ours in pairs:
        p, q = (nn.Parameter(draw(4, 3)) for _ in range(2))
        first, second = theirs([p]), ours([q])
        for seed in range(5):
            if seed == 2:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
                q.data.copy_(p)
            p.grad, q.grad = draw(4, 3, seed=seed), draw(4, 3, seed=seed)
            first.step()
            if seed >= 2:
                second.step()
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    without = torch.optim.SGD([p], lr=0.1)
    p.grad = draw(4, 3)
    without.step()
    second.load_state_dict(without.state_dict())
    assert int(second.state[q].get("step", 0)) == 0


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


def test_a_single_weight_has_one_adagrad() -> None:
    """Weight decay is part of what both forms sum."""
    p, q = (nn.Parameter(draw(1)) for _ in range(2))
    whole = AdAdaGradNorm([p], initial=0.5, weight_decay=0.3)
    apart = AdAdaGrad([q], initial=0.5, weight_decay=0.3)
    for seed in range(4):
        p.grad, q.grad = draw(1, seed=seed), draw(1, seed=seed)
        whole.step()
        apart.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_norms_of_several_devices_are_joined_on_one() -> None:
    group = {"sum_of_squares": 0.5}
    grads = [torch.ones(3, device="meta"), torch.ones(2)]
    (found,) = AdagradNorm().survey([(group, grads)])
    assert found["norm_so_far"].device.type == "meta"


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
    tensors = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    for block in bucket.blocks(range(len(sizes))):
        seen[block.start : block.stop] += 1
        assert block.stop - block.start <= BLOCK
        piece = bucket.piece(tensors, block)
        owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        assert torch.equal(piece, owners[block.start : block.stop].float())
    assert (seen == 1).all()


def test_units_are_neighbours_that_fit_a_block_and_large_weights_alone() -> None:
    sizes = [5, BLOCK // 2, BLOCK, 1, 2 * BLOCK, 3, 4, BLOCK - 7, 1]
    bucket = Bucket([nn.Parameter(torch.zeros(size)) for size in sizes])
    assert bucket.units(range(9)) == [[0, 1], [2], [3], [4], [5, 6, 7], [8]]
    # What has no gradient cuts, too.
    assert bucket.units([0, 2, 3, 7]) == [[0], [2], [3], [7]]
