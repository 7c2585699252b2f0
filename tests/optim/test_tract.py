"""TrAct's gradient against its closed forms, and the layers against plain ones."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from tests.oracles import tract as oracle
from torch import nn
from torch.nn import functional

from rectiflow.nets import build
from rectiflow.optim import (
    DiffGrad,
    SophiaH,
    TrActConv1d,
    TrActConv2d,
    TrActConv3d,
    TrActLinear,
    apply_tract,
    first_layer,
    hutchinson,
    plain_gradients,
    remove_tract,
    tract,
    tract_gradient,
    tract_windows,
)

DOUBLE = torch.float64
# Layer and input of every kind: more rows than weights and fewer, overlapping and distant windows.
LAYERS = {
    "linear, tall": (lambda: nn.Linear(4, 3), (9, 4)),
    "linear, wide": (lambda: nn.Linear(12, 3), (5, 12)),
    "linear, tokens": (lambda: nn.Linear(4, 3, bias=False), (2, 5, 4)),
    "linear, one sample": (lambda: nn.Linear(4, 3), (4,)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (3, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (3, 2, 6, 5)),
    "conv2d, patches": (lambda: nn.Conv2d(2, 3, 2, stride=2, bias=False), (3, 2, 6, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 6, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3), (2, 3, 5, 5)),
    "conv2d, dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=(2, 1), stride=2), (3, 2, 7, 6)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (2, 2, 5, 5)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 4, 5)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5),
    ),
    "conv2d, circular": (
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 2, 5, 5),
    ),
    "conv2d, few rows": (lambda: nn.Conv2d(3, 2, 4), (1, 3, 5, 5)),
    "conv2d, one image": (lambda: nn.Conv2d(2, 3, 3), (2, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, padding=1), (2, 1, 3, 4, 3)),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", sorted(LAYERS))
FORMS = pytest.mark.parametrize("form", ["backward", "graph"])


def rows(b: int, n: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, k, generator=generator, dtype=DOUBLE) for k in (n, m))


def made(name: str, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, torch.Tensor]:
    """A layer and its input, the same at every call."""
    maker, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return maker().to(dtype), torch.randn(shape, dtype=dtype)


def factors(z: torch.Tensor) -> torch.Tensor:
    """A different one for each output."""
    return torch.arange(z.numel(), dtype=DOUBLE).sin().reshape(z.shape).to(z.dtype)


def passed(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    z = layer(x)
    (z * factors(z)).mean().backward()
    found = {"output": z.detach(), "inputs": x.grad, "weight": layer.weight.grad}
    return found if layer.bias is None else {**found, "bias": layer.bias.grad}


# Oracles


@pytest.mark.parametrize("branch", ["tall", "wide", "auto"])
@pytest.mark.parametrize("size", [(20, 6), (4, 9), (7, 7)])
def test_gradient_is_the_plain_one_times_an_inverse(branch, size) -> None:
    a, g = rows(*size, 3)
    moment = a.T @ a / len(a)
    expected = g.T @ a @ torch.linalg.inv(moment + 0.1 * torch.eye(size[1], dtype=DOUBLE))
    found = tract_gradient(a, g, 0.1, branch=branch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    scaled = 0.1 * float(moment.diagonal().mean())
    torch.testing.assert_close(
        tract_gradient(a, g, 0.1, relative=True, branch=branch),
        tract_gradient(a, g, scaled, branch=branch),
        rtol=1e-10, atol=1e-11,
    )  # fmt: skip


def test_auto_solves_the_smaller_system(monkeypatch) -> None:
    sizes = []
    solved = tract.solved
    monkeypatch.setattr(tract, "solved", lambda m, *r: sizes.append(len(m)) or solved(m, *r))
    tract_gradient(*rows(20, 6, 3))
    tract_gradient(*rows(4, 9, 3))
    assert sizes == [6, 4]


@EVERY
@FORMS
def test_layers_change_the_weight_gradient_alone(name, form) -> None:
    plain, x = made(name)
    layer, _ = made(name)
    apply_tract(layer, 0.05, form=form)
    wanted, found = passed(plain, x), passed(layer, x)
    for key in wanted.keys() - {"weight"}:
        assert torch.equal(found[key], wanted[key]), key
    expected = oracle.gradient(plain, x, wanted["weight"], 0.05)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stride", [3, 2])
def test_convolution_is_a_linear_layer_on_unfolded_images(stride) -> None:
    conv = TrActConv2d(2, 4, 3, stride=stride, lam=0.2, dtype=DOUBLE)
    linear = TrActLinear(18, 4, lam=0.2, dtype=DOUBLE)
    linear.weight.data = conv.weight.detach().flatten(1).clone()
    linear.bias.data = conv.bias.detach().clone()
    x = torch.randn(3, 2, 9, 9, dtype=DOUBLE)
    unfolded = functional.unfold(x, 3, stride=stride).mT
    conv(x).square().mean().backward()
    linear(unfolded).square().mean().backward()
    torch.testing.assert_close(
        conv.weight.grad.flatten(1), linear.weight.grad, rtol=1e-10, atol=1e-12
    )


def test_step_is_the_ridge_regression() -> None:
    a, g = rows(15, 6, 4)
    eta, lam, b = 0.7, 0.3, 15
    weight = torch.randn(4, 6, dtype=DOUBLE)
    wanted = a @ weight.T - eta * b * g
    step = (-eta * tract_gradient(a, g, lam)).requires_grad_()
    loss = (wanted - a @ (weight + step).T).square().sum() + lam * b * step.square().sum()
    (slope,) = torch.autograd.grad(loss, step)
    assert slope.abs().max() < 1e-10


def test_chunks_of_images_add_up(monkeypatch) -> None:
    layer, x = made("conv2d, groups")
    apply_tract(layer)
    whole = passed(layer, x)["weight"].clone()
    layer.zero_grad()
    monkeypatch.setattr(tract_windows, "CHUNK", 1)
    torch.testing.assert_close(passed(layer, x)["weight"], whole, rtol=1e-12, atol=1e-14)


# Limits


def test_large_damping_gives_the_plain_gradient() -> None:
    a, g = rows(20, 5, 3)
    plain = g.T @ a
    for lam in (1e3, 1e5):
        error = (lam * tract_gradient(a, g, lam) - plain).norm() / plain.norm()
        assert error < 5 / lam  # the largest eigenvalue of a second moment of variance one


def test_small_damping_moves_outputs_as_far_as_inputs_allow() -> None:
    a, g = rows(20, 5, 3)
    moved = a @ tract_gradient(a, g, 1e-12).T
    onto = a @ torch.linalg.pinv(a)
    torch.testing.assert_close(moved, onto @ (20 * g), rtol=1e-9, atol=1e-9)


def test_orthonormal_inputs_shorten_the_gradient() -> None:
    a, g = rows(20, 5, 3)
    a = torch.linalg.qr(a).Q * 20**0.5
    torch.testing.assert_close(tract_gradient(a, g, 0.5), g.T @ a / 1.5, rtol=1e-12, atol=1e-13)


def test_tokens_move_by_the_mean_of_their_gradients() -> None:
    tokens = torch.tensor([0, 2, 2, 5, 2, 0, 0, 2])
    a = functional.one_hot(tokens, 7).to(DOUBLE)
    g = rows(8, 1, 3)[1]
    for lam in (0.3, 1e-10):
        expected = torch.zeros(3, 7, dtype=DOUBLE)
        for token in (0, 2, 5):
            own = tokens == token
            expected[:, token] = 8 * g[own].sum(0) / (int(own.sum()) + 8 * lam)
        torch.testing.assert_close(tract_gradient(a, g, lam), expected, rtol=1e-9, atol=1e-10)


# Properties


def test_no_fixed_point_is_won_or_lost() -> None:
    a, g = rows(20, 5, 3)
    g = g - a @ torch.linalg.pinv(a) @ g
    assert (g.T @ a).abs().max() < 1e-12
    assert tract_gradient(a, g).abs().max() < 1e-11
    assert tract_gradient(a, a[:, :1] * 1e-8).norm() > 1e-9


def test_pixels_up_to_255_are_solved_in_single_precision() -> None:
    # The Gram matrix of 256 pixels alone is rounded by more than lam: undamped, Cholesky fails.
    a = torch.rand(300, 256) * 255
    g = torch.randn(300, 2)
    found = tract_gradient(a, g)
    moment = a.double().T @ a.double() / 300
    floor = 4 * torch.finfo(torch.float32).eps * moment.trace()
    assert floor > 0.1
    exact = g.double().T @ a.double() @ torch.linalg.inv(moment + floor * torch.eye(256))
    assert (found - exact).norm() < 1e-3 * exact.norm()


def test_nothing_in_nothing_out() -> None:
    assert torch.equal(tract_gradient(torch.zeros(0, 3), torch.zeros(0, 2)), torch.zeros(2, 3))
    layer = TrActLinear(3, 2, relative=True)
    layer(torch.zeros(4, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(2, 3))


def test_bad_inputs_are_not_hidden() -> None:
    a, g = rows(9, 3, 2)
    a[4, 1] = torch.nan
    assert tract_gradient(a, g).isnan().all()
    layer = TrActConv2d(1, 2, 3)
    layer(torch.full((2, 1, 8, 8), torch.inf)).sum().backward()
    assert layer.weight.grad.isnan().all()


def test_frozen_weights_stay_frozen() -> None:
    layer = TrActLinear(3, 2)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 3)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 4.0))


def test_activations_may_work_in_place() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)]
    plain, x = nn.Sequential(*copy.deepcopy(layers)), torch.randn(2, 1, 8, 8)
    model = nn.Sequential(*copy.deepcopy(layers))
    apply_tract(model, 1e6)
    for net in (plain, model):
        net(x).square().mean().backward()
    torch.testing.assert_close(
        1e6 * model[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["linear, wide", "conv2d, groups"])
def test_autocast_stays_close(name) -> None:
    layer, x = made(name, torch.float32)
    apply_tract(layer)
    full = passed(layer, x)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = passed(layer, x)
    assert half["output"].dtype is torch.bfloat16
    assert half["weight"].dtype is torch.float32
    # bf16 keeps eight bits: 0.4 % a number.
    assert (half["weight"] - full["weight"]).norm() < 0.02 * full["weight"].norm()


def test_half_precision_weights_get_gradients_of_their_kind() -> None:
    layer, x = made("conv2d", torch.bfloat16)
    apply_tract(layer)
    assert passed(layer, x)["weight"].dtype is torch.bfloat16
    single, _ = made("conv2d", torch.float32)
    apply_tract(single)
    wanted = passed(single, x.float())["weight"]
    assert (layer.weight.grad.float() - wanted).norm() < 0.05 * wanted.norm()


# Gradient


def test_second_derivatives_are_refused() -> None:
    layer, x = TrActLinear(3, 2), torch.randn(4, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a gradient of TrAct has no derivative"):
        slope.square().sum().backward()
    # Where only some inputs are asked for, autograd would leave the layer out and say nothing.
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    apply_tract(model)
    with pytest.raises(RuntimeError, match="plain_gradients"):
        hutchinson(model(x).square().mean(), list(model.parameters()))
    optimizer = SophiaH(model.parameters())
    with pytest.raises(RuntimeError, match="plain_gradients"):
        optimizer.refresh(lambda: model(x).square().mean())
    with plain_gradients(model):
        optimizer.refresh(lambda: model(x).square().mean())
    assert optimizer.state[model[0].weight]["hessian"].any()


@FORMS
@pytest.mark.parametrize("parametrised", [False, True])
def test_layers_are_plain_in_a_block(form, parametrised) -> None:
    wanted, x = made("conv2d")
    layer = copy.deepcopy(wanted)
    apply_tract(layer, form=form)
    if parametrised:
        for one in (wanted, layer):
            nn.utils.parametrizations.weight_norm(one)
    kind, text = type(layer), repr(layer)

    def slopes(one: nn.Module) -> tuple[torch.Tensor, ...]:
        z = one(x)
        return torch.autograd.grad((z * factors(z)).mean(), list(one.parameters()))

    with plain_gradients(layer):
        inside = slopes(layer)
    assert (type(layer), repr(layer)) == (kind, text)
    outside = slopes(layer)
    torch.testing.assert_close(inside, slopes(wanted))
    assert not all(torch.allclose(a, b) for a, b in zip(inside, outside))


def test_functional_gradients() -> None:
    x = torch.randn(6, 3, dtype=DOUBLE)
    for form in ("backward", "graph"):
        layer = TrActLinear(3, 2, form=form, dtype=DOUBLE)

        def loss(params, rows, layer=layer):
            return torch.func.functional_call(layer, params, (rows,)).square().mean()

        params = {name: p.detach() for name, p in layer.named_parameters()}
        found = torch.func.grad(loss)(params, x)
        loss(dict(layer.named_parameters()), x).backward()
        torch.testing.assert_close(found["weight"], layer.weight.grad)
    # Of single samples: only the form made of plain operations can be mapped.
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x[:, None])
    torch.testing.assert_close(each["weight"][4], torch.func.grad(loss)(params, x[4:5])["weight"])


def test_compiled() -> None:
    layer, x = made("linear, tall")
    apply_tract(layer)
    wanted = passed(layer, x)["weight"].clone()
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager")
    z = compiled(x)
    (z * factors(z)).mean().backward()
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-10, atol=1e-12)


# Life: in and out of models


class Timed(nn.Module):
    """A flow network that embeds time before it looks at the data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.time = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4))
        self.out = nn.Linear(4, 2)
        self.into = nn.Linear(2, 4)
        self.drop = nn.BatchNorm1d(4)

    def forward(self, x, t):
        return self.out(self.drop(self.into(self.scale * x) + self.time(t[:, None])))


def test_first_layer_is_the_first_that_sees_the_data() -> None:
    model = Timed()
    model.out.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert apply_tract(model, example=(torch.randn(3, 2), torch.rand(3))) == "into"
    assert type(model.into) is TrActLinear
    assert type(model.time[0]) is nn.Linear
    assert model.training
    assert model.drop.training
    assert [p.requires_grad for p in model.out.parameters()] == [False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(len(m._forward_pre_hooks) for m in model.modules())
    called = Timed()
    assert first_layer(called, lambda: called(torch.randn(3, 2), torch.rand(3))) == "into"
    assert apply_tract(Timed()) == "time.0"
    assert apply_tract(Timed(), layer="out") == "out"


def test_first_layer_of_the_flow_networks() -> None:
    net = build("unet", shape=(1, 8, 8), width=8, multipliers=(1, 2), blocks=1, attention=())
    path = apply_tract(net, example=(torch.randn(2, 1, 8, 8), torch.rand(2)))
    found = net.get_submodule(path)
    assert type(found) is TrActConv2d
    assert found.in_channels == 1
    net = build("mlp", shape=(2,), width=8, depth=1)
    found = net.get_submodule(apply_tract(net, example=(torch.randn(3, 2), torch.rand(3))))
    assert type(found) is TrActLinear


def test_wrapping_keeps_everything_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    early = DiffGrad(model.parameters(), lr=0.1)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    layer, weight = model[0], model[0].weight
    keys, text = list(model.state_dict()), repr(model)
    apply_tract(model, 0.2)
    assert model[0] is layer
    assert layer.weight is weight
    assert list(model.state_dict()) == keys
    assert "lam=0.2" in repr(model)
    late = DiffGrad(model.parameters(), lr=0.1)
    x = torch.randn(4, 1, 8, 8)
    for optimizer in (early, late):
        before = weight.detach().clone()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(weight, before)
    assert seen == ["forward", weight.shape] * 2
    assert apply_tract(model, 0.4) == "0"
    assert layer.tract.lam == 0.4
    assert remove_tract(model) is model
    assert type(layer) is nn.Conv2d
    assert repr(model) == text
    assert not hasattr(layer, "tract")


def test_layers_copy_pickle_and_load() -> None:
    layer = TrActConv1d(2, 3, 3, lam=0.3, relative=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.tract == layer.tract
        assert torch.equal(other.weight, layer.weight)
    plain = nn.Conv1d(2, 3, 3)
    plain.load_state_dict(layer.state_dict())
    assert type(TrActConv3d(1, 2, 2)(torch.randn(1, 1, 3, 3, 3))) is torch.Tensor
    # Parametrised after TrAct, a layer is still rectified.
    torch.nn.utils.parametrizations.weight_norm(layer)
    layer(torch.randn(4, 2, 9)).square().mean().backward()
    assert layer.parametrizations.weight.original1.grad is not None
    with pytest.raises(ValueError, match="remove its parametrisations first"):
        remove_tract(layer)


def test_what_cannot_be_is_refused() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match="'0' is Embedding: give the path of another one"):
        apply_tract(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="'the model' is Own"):
        apply_tract(Own(2, 2))
    with pytest.raises(ValueError, match="no layer 'stem'"):
        apply_tract(nn.Linear(2, 2), layer="stem")
    with pytest.raises(ValueError, match="no layer with weights was found: give"):
        apply_tract(nn.ReLU())
    with pytest.raises(ValueError, match="that sees the data"):
        apply_tract(nn.ReLU(), example=(torch.ones(2),))
    with pytest.raises(ValueError, match="the example begins with the data"):
        apply_tract(nn.Linear(2, 2), example=())
    with pytest.raises(ValueError, match="floating-point tensor; for others"):
        apply_tract(nn.Embedding(3, 2), example=(torch.tensor([1]),))
    with pytest.raises(ValueError, match="real floating-point"):
        apply_tract(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="lam must be > 0"):
        TrActLinear(2, 2, lam=0.0)
    with pytest.raises(ValueError, match="unknown gram 'all': "):
        TrActConv2d(2, 2, 1, gram="all")
    with pytest.raises(ValueError, match="unknown form"):
        apply_tract(nn.Linear(2, 2), form="hook")
    with pytest.raises(ValueError, match="unknown branch"):
        tract_gradient(*rows(3, 2, 1), branch="long")


def _worker(rank: int, folder: str, queue) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    # Shards of different second moments, one of them with fewer rows than weights.
    x = torch.arange(60, dtype=DOUBLE).sin().reshape(12, 5)
    own = x[:8] if rank == 0 else x[8:]
    found = {}
    for gram in ("local", "allreduce"):
        layer = TrActLinear(5, 2, gram=gram, dtype=DOUBLE)
        nn.init.constant_(layer.weight, 0.3)
        nn.init.zeros_(layer.bias)
        layer(own).square().sum().div(12).backward()
        torch.distributed.all_reduce(layer.weight.grad)
        found[gram] = layer.weight.grad.tolist()
    queue.put(found)
    torch.distributed.destroy_process_group()


def test_processes_share_one_second_moment(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [fork.Process(target=_worker, args=(r, str(tmp_path), queue)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    whole = TrActLinear(5, 2, dtype=DOUBLE)
    nn.init.constant_(whole.weight, 0.3)
    nn.init.zeros_(whole.bias)
    x = torch.arange(60, dtype=DOUBLE).sin().reshape(12, 5)
    whole(x).square().sum().div(12).backward()
    for one in found:
        shared, local = (torch.tensor(one[gram], dtype=DOUBLE) for gram in ("allreduce", "local"))
        torch.testing.assert_close(shared, whole.weight.grad, rtol=1e-10, atol=1e-12)
        assert (local - shared).norm() > 1e-3 * shared.norm()
