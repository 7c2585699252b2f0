"""What every optimizer must do, whatever its rule: one list, run over all of them."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from tests.oracles import optimizers as loops
from torch import nn

from rectiflow.optim import (
    SGDP,
    AdAdaGrad,
    AdAdaGradNorm,
    AdamP,
    CoordinateClipped,
    DiffGrad,
    SophiaG,
    SophiaH,
    SplitSGD,
    buckets,
)

# Name: ours, its loop twin, the largest learning rate of the tests.
KINDS = {
    "DiffGrad": (DiffGrad, loops.DiffGrad, 1e-2),
    "AdamP": (AdamP, loops.AdamP, 1e-2),
    "AdamP, nesterov": (
        partial(AdamP, nesterov=True), partial(loops.AdamP, nesterov=True), 1e-2,
    ),
    "SGDP": (partial(SGDP, momentum=0.9), partial(loops.SGDP, momentum=0.9), 1e-2),
    "SGDP, nesterov": (
        partial(SGDP, momentum=0.9, nesterov=True),
        partial(loops.SGDP, momentum=0.9, nesterov=True),
        1e-2,
    ),
    "SGDP, projected buffer": (
        partial(SGDP, momentum=0.9, project_buffer=True),
        partial(loops.SGDP, momentum=0.9, project_buffer=True),
        1e-2,
    ),
    "SophiaG": (SophiaG, loops.Sophia, 1e-2),
    "SophiaG, added eps": (
        partial(SophiaG, eps=0.1, eps_mode="add"),
        partial(loops.Sophia, eps=0.1, eps_mode="add"),
        1e-2,
    ),
    "SophiaH": (partial(SophiaH, gamma=0.05), loops.Sophia, 1e-2),
    "AdAdaGrad": (AdAdaGrad, loops.AdAdaGrad, 1e-2),
    "AdAdaGradNorm": (AdAdaGradNorm, loops.AdAdaGradNorm, 1e-1),
    "clipped SGD": (CoordinateClipped, loops.Clipped, 1e-2),
    "clipped Adam": (
        partial(CoordinateClipped, base="adam"), partial(loops.Clipped, base="adam"), 1e-2,
    ),
    "clipped Lion": (
        partial(CoordinateClipped, base="lion"), partial(loops.Clipped, base="lion"), 1e-3,
    ),
    "SplitSGD": (SplitSGD, loops.SplitSGD, 1e-2),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", sorted(KINDS))
# Small ones that share a block, one larger than a block, none, one number, channels last.
SHAPES = [(5, 3), (4,), (21, 17), (), (0, 3), (3, 2, 3, 3), (7, 1)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(buckets, "BLOCK", 128)


def weights(dtype=torch.float64, shapes=SHAPES, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if len(shape) == 4:
            value = value.to(memory_format=torch.channels_last)
        made.append(nn.Parameter(value))
    return made


def push(params, step: int, *, kept: bool = False, skip=()) -> None:
    """Gradients of a step; those of 'kept' overwrite tensors that are there."""
    generator = torch.Generator().manual_seed(1000 + step)
    for place, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        grad = (0.3 * noise + 0.1 * p.detach().double()).to(p.dtype)
        if p.ndim == 2 and p.numel() and p.shape[1] > 1 and step % 3 == 0:
            # Orthogonal to the weight by row, as that of scale-invariant weights is.
            rows = p.detach()
            along = (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
            grad = grad - along * rows
        if place in skip:
            p.grad = None
        elif kept and p.grad is not None:
            p.grad.copy_(grad)
        else:
            p.grad = grad


def bend(optimizer, params, step: int) -> None:
    """Curvature for Sophia every ten steps, by a refresh; the loop is told the same numbers."""
    if step % 10 != 1 or not isinstance(optimizer, SophiaG | SophiaH | loops.Sophia):
        return
    generator = torch.Generator().manual_seed(2000 + step)
    # From so little that steps are clipped to so much that they are not.
    drawn = [torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in params]
    curvature = [100 * c.square().to(p.dtype) for c, p in zip(drawn, params)]
    if isinstance(optimizer, SophiaG):
        optimizer.refresh(
            lambda: (sum((p * (c / 3).sqrt()).sum() for p, c in zip(params, curvature)), 3)
        )
    elif isinstance(optimizer, SophiaH):
        optimizer.refresh(
            lambda: sum((c * p.square()).sum() / 2 for p, c in zip(params, curvature))
        )
    else:
        for p, c in zip(params, curvature):
            mean = optimizer.state[p]["hessian"]
            mean.lerp_(c.to(mean.dtype), 1 - optimizer.param_groups[0]["betas"][1])


def run(optimizer, params, steps, *, start=0, curved=False, **options) -> None:
    for step in range(start, start + steps):
        push(params, step, **options)
        if curved:
            bend(optimizer, params, step)
        optimizer.step()


def close(ours, theirs, dtype=torch.float64) -> None:
    # 50 steps of rounding; in single precision signs and thresholds may tip over.
    rtol, atol = (1e-12, 1e-13) if dtype is torch.float64 else (2e-4, 2e-5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


@EVERY
@pytest.mark.parametrize("decay, steps", [(0.1, 50), (0.0, 8)])
def test_equals_the_loop(name, decay, steps) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(), weights()
    first, second = ours(a, lr=rate, weight_decay=decay), twin(b, lr=rate, weight_decay=decay)
    run(first, a, steps, curved=True)
    run(second, b, steps, curved=True)
    close(a, b)
    for p, q in zip(a, b):
        for slot, value in second.state[q].items():
            torch.testing.assert_close(
                first.state[p][slot], value, rtol=1e-11, atol=1e-12, check_dtype=False
            )


@EVERY
def test_equals_the_loop_in_single_precision(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(torch.float32), weights(torch.float32)
    # Signs and thresholds of equal numbers may differ by a rounding: a few weights go their way.
    run(ours(a, lr=rate), a, 50, curved=True)
    run(twin(b, lr=rate), b, 50, curved=True)
    for p, q in zip(a, b):
        away = (p - q).abs() > 2e-5 + 2e-4 * q.abs()
        assert float(away.double().mean()) <= 1e-3 if p.numel() else True


@EVERY
def test_half_precision_weights_keep_their_state_in_single(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(torch.bfloat16), weights(torch.bfloat16)
    first, second = ours(a, lr=rate), twin(b, lr=rate)
    run(first, a, 5)
    run(second, b, 5)
    for p, q in zip(a, b):
        assert p.dtype is torch.bfloat16
        # At most one unit in the last of eight bits.
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-3)
        floats = [v for v in first.state[p].values() if v.is_floating_point()]
        assert all(v.dtype is torch.float32 for v in floats)
    loaded = ours(weights(torch.bfloat16), lr=rate)
    loaded.load_state_dict(first.state_dict())
    for p, q in zip(a, loaded.param_groups[0]["params"]):
        for slot, value in first.state[p].items():
            assert torch.equal(loaded.state[q][slot], value)
            assert loaded.state[q][slot].dtype is torch.float32


@EVERY
def test_state_round_trips_and_loads_into_the_loop(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b, c = weights(), weights(), weights()
    first = ours(a, lr=rate)
    run(first, a, 7, curved=True)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    second, third = ours(b, lr=rate), twin(c, lr=rate)
    for optimizer, params in ((second, b), (third, c)):
        optimizer.load_state_dict(copy.deepcopy(saved))
        for p, q in zip(params, a):
            p.data.copy_(q)
    run(first, a, 5, start=7, curved=True)
    run(second, b, 5, start=7, curved=True)
    run(third, c, 5, start=7, curved=True)
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    close(a, c)
    if isinstance(first, SophiaG | SophiaH):
        assert 0.1 < first.win_rate() < 0.9


@EVERY
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(name, way) -> None:
    ours, _, rate = KINDS[name]
    a = weights()
    first = ours(a, lr=rate)
    run(first, a, 3)
    for p in a:
        p.grad = None
    second = copy.deepcopy(first) if way == "deepcopy" else pickle.loads(pickle.dumps(first))
    b = second.param_groups[0]["params"]
    run(first, a, 4, start=3)
    before = [p.detach().clone() for p in b]
    run(second, b, 4, start=3)
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert not torch.equal(before[0], b[0])


@EVERY
def test_groups_have_settings_of_their_own(name) -> None:
    ours, twin, rate = KINDS[name]

    def grouped(params):
        halves = [{"params": params[:3]}, {"params": params[3:], "lr": rate / 4}]
        halves[1]["weight_decay"] = 0.2
        return halves

    a, b = weights(), weights()
    run(ours(grouped(a), lr=rate), a, 6)
    run(twin(grouped(b), lr=rate), b, 6)
    close(a, b)


@EVERY
def test_groups_may_come_late(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(), weights()
    for params, kind in ((a, ours), (b, twin)):
        optimizer = kind(params[:3], lr=rate)
        run(optimizer, params[:3], 4)
        optimizer.add_param_group({"params": params[3:], "lr": rate / 2})
        run(optimizer, params, 4, start=4)
    close(a, b)


@EVERY
def test_weights_without_gradient_are_left_alone(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(), weights()
    a[1].requires_grad_(False)
    b[1].requires_grad_(False)
    frozen = a[1].detach().clone()
    first, second = ours(a, lr=rate), twin(b, lr=rate)
    for start, skip in ((0, (1,)), (3, (0, 1, 5)), (6, (1,)), (9, (1, 2))):
        run(first, a, 3, start=start, skip=skip)
        run(second, b, 3, start=start, skip=skip)
    close(a, b)
    assert torch.equal(a[1], frozen)
    for p in a:
        p.grad = None
    before = [p.detach().clone() for p in a]
    first.step()
    assert all(torch.equal(p, q) for p, q in zip(a, before))


@EVERY
def test_gradients_may_be_kept_or_made_anew(name) -> None:
    ours, _, rate = KINDS[name]
    a, b = weights(), weights()
    first, second = ours(a, lr=rate), ours(b, lr=rate)
    for step in range(6):
        first.zero_grad(set_to_none=False)
        second.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in b)
        push(a, step, kept=True)
        push(b, step)
        kept = [p.grad.clone() for p in a]
        first.step()
        second.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(a, kept))
    assert all(torch.equal(p, q) for p, q in zip(a, b))


@EVERY
def test_weights_keep_identity_shape_and_layout(name) -> None:
    ours, _, rate = KINDS[name]
    a = weights()
    kinds = [(p.shape, p.stride(), id(p)) for p in a if p.numel()]
    seen = a[0].detach().clone()
    graph = (a[0] * a[0]).sum()
    run(ours(a, lr=rate), a, 2)
    assert [(p.shape, p.stride(), id(p)) for p in a if p.numel()] == kinds
    assert not torch.equal(a[0], seen)
    # A graph that kept the old weights notices that they have changed.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


@EVERY
def test_weights_that_were_exchanged_are_found_again(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(), weights()
    first, second = ours(a, lr=rate), twin(b, lr=rate)
    run(first, a, 3)
    run(second, b, 3)
    for p in a:
        p.data = p.data.clone()
    run(first, a, 3, start=3)
    run(second, b, 3, start=3)
    close(a, b)


@EVERY
def test_shared_memory_is_not_moved(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(), weights()
    for p in a:
        p.share_memory_()
    places = [p.data_ptr() for p in a]
    run(ours(a, lr=rate), a, 4)
    run(twin(b, lr=rate), b, 4)
    assert [p.data_ptr() for p in a] == places
    close(a, b)


@EVERY
def test_kinds_of_weights_may_be_mixed(name) -> None:
    ours, twin, rate = KINDS[name]
    a = weights(torch.float32, [(6, 4), (3,)]) + weights(torch.float64, [(5, 2)])
    b = weights(torch.float32, [(6, 4), (3,)]) + weights(torch.float64, [(5, 2)])
    if "clipped" in name or name == "SplitSGD":
        # One threshold over all: the loop cannot join dtypes either.
        a, b = a[:2], b[:2]
    run(ours(a, lr=rate), a, 5)
    run(twin(b, lr=rate), b, 5)
    close(a, b, torch.float32)


@EVERY
def test_closures_schedules_and_tensor_rates(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(), weights()
    first, second = ours(a, lr=torch.tensor(rate, dtype=torch.float64)), twin(b, lr=rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for optimizer in (first, second)
    ]

    def closure():
        assert torch.is_grad_enabled()
        push(a, closure.step)
        return torch.tensor(4.5)

    for closure.step in range(4):
        assert float(first.step(closure)) == 4.5
        push(b, closure.step)
        second.step()
        for schedule in schedules:
            schedule.step()
    close(a, b)


@EVERY
def test_upward_is_downward_of_the_negative(name) -> None:
    ours, _, rate = KINDS[name]
    a, b = weights(), weights()
    first, second = ours(a, lr=rate, maximize=True), ours(b, lr=rate)
    for step in range(4):
        push(b, step)
        for p, q in zip(a, b):
            p.grad = -q.grad
        first.step()
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b))


@EVERY
def test_a_convex_problem_is_solved(name) -> None:
    ours, _, _ = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8, generator=generator)
    wanted = rows @ torch.randn(8, 1, generator=generator)
    weight = nn.Parameter(torch.zeros(8, 1))
    rates = {
        "AdAdaGradNorm": 2.0,
        "AdAdaGrad": 0.5,
        "SGDP": 0.02,
        "clipped SGD": 0.02,
        "clipped Adam": 0.3,
    }
    fast = rates.get(name.split(",")[0], 0.05)
    optimizer = ours([weight], lr=fast, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    first = None
    for _ in range(400):
        optimizer.zero_grad()
        loss = (rows @ weight - wanted).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        first = loss.item() if first is None else first
    assert loss.item() < 1e-2 * first


@EVERY
def test_scaled_losses_and_clipped_norms(name) -> None:
    ours, twin, rate = KINDS[name]
    a, b = weights(torch.float32), weights(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    first, second = ours(a, lr=rate), twin(b, lr=rate)
    for step in range(4):
        push(a, step)
        push(b, step)
        scaler.scale(torch.ones(()))
        for p in a:
            p.grad.mul_(scaler.get_scale())
        scaler.unscale_(first)
        torch.nn.utils.clip_grad_norm_(a, 5.0)
        torch.nn.utils.clip_grad_norm_(b, 5.0)
        scaler.step(first)
        scaler.update()
        second.step()
    for p, q in zip(a, b):
        away = (p - q).abs() > 2e-5 + 2e-4 * q.abs()
        assert not p.numel() or float(away.double().mean()) <= 2e-3


@EVERY
def test_bad_settings_are_refused(name) -> None:
    ours, _, rate = KINDS[name]
    for wrong in ({"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="must be >= 0"):
            ours(weights(), **{"lr": rate, **wrong})
    with pytest.raises(ValueError, match="real floating-point weights, got"):
        ours([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=rate)
    with pytest.raises(ValueError, match="empty parameter list"):
        ours([], lr=rate)
    optimizer = ours(weights(), lr=rate)
    with pytest.raises(ValueError, match="must be >= 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = ours(table.parameters(), lr=rate)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="takes dense gradients, got a sparse one"):
        optimizer.step()


def test_a_trained_step_may_be_compiled_around() -> None:
    """A compiled function that steps breaks its graph there and goes on."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = DiffGrad([weight], lr=0.1)

    @torch.compile(backend="eager")
    def train() -> None:
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()

    for _ in range(3):
        train()
    assert (weight < 1).all()


def test_accelerate_drives_them() -> None:
    import accelerate

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    twin = copy.deepcopy(model)
    plain = AdamP(twin.parameters(), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, AdamP(model.parameters(), lr=0.1))
    x = torch.randn(8, 3)
    for _ in range(3):
        for one, net in ((optimizer, model), (plain, twin)):
            one.zero_grad()
            loss = net(x).square().mean()
            accelerator.backward(loss) if one is optimizer else loss.backward()
            one.step()
    assert torch.equal(model.weight, twin.weight)
