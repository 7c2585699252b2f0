"""What every built-in network must do; a net joins by being in the table."""

from __future__ import annotations

import json

import pytest
import torch
from tests.stirring import stirred

from rectiflow.nets import MLP, UNet, build
from rectiflow.nets.registry import NETS

SMALL = {
    "mlp": {"shape": (1, 8, 8), "width": 16, "depth": 2, "time_features": 8},
    "mmdit": {
        "shape": (1, 8, 8),
        "depth": 3,
        "heads": 2,
        "head_dim": 8,
        "qk_norm": "rms",
        "dual_layers": (0,),
    },
    "stacked": {
        "shape": (1, 8, 8),
        "first": {"name": "mlp", "width": 16, "depth": 1, "time_features": 8},
        "second": {"name": "mlp", "width": 8, "depth": 2, "time_features": 8},
    },
    "unet": {
        "shape": (1, 8, 8),
        "width": 8,
        "multipliers": (1, 2),
        "blocks": 1,
        "attention": (8,),
        "heads": 2,
        "dropout": 0.0,
    },
}
EVERY = pytest.mark.parametrize("name", sorted(NETS))


def net_of(name: str, seed: int = 0, **config) -> torch.nn.Module:
    """A small net of a name."""
    return stirred(build(name, **{**SMALL[name], **config}), seed=seed)


def batch(size: int = 4, **kwargs):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 1, 8, 8, generator=generator, **kwargs)
    return x, torch.rand(size, generator=generator, **kwargs)


@EVERY
def test_starts_as_zero(name):
    x, t = batch()
    assert torch.count_nonzero(build(name, **SMALL[name])(x, t)) == 0


@EVERY
def test_samples_do_not_see_each_other(name):
    net = net_of(name, classes=10)
    x, t = batch(6)
    label = torch.tensor([0, 1, 2, 8, 9, 10])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    y = net(x, t, label=label)
    # Kernels may sum in another order for another place in the batch.
    torch.testing.assert_close(
        net(x[order], t[order], label=label[order]), y[order], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(net(x[:1], t[:1], label=label[:1]), y[:1], atol=1e-5, rtol=1e-5)


@EVERY
def test_depends_on_time_and_label(name):
    net = net_of(name, classes=3)
    x, t = batch()
    ones = torch.ones(len(x), dtype=torch.int64)
    assert not torch.allclose(net(x, t), net(x, t.flip(0)))
    assert not torch.allclose(net(x, t, label=ones), net(x, t, label=2 * ones))


@EVERY
def test_no_label_is_exactly_the_null_label(name):
    net = net_of(name, classes=3)
    x, t = batch()
    label = torch.tensor([0, 1, 2, 1])
    null = net.null_condition(label=label)
    assert null["label"].tolist() == [3, 3, 3, 3]
    assert torch.equal(net(x, t), net(x, t, **null))
    assert net.null_condition() == {}
    assert net.null_condition(label=None) == {}


@EVERY
@pytest.mark.parametrize("classes", [0, 5])
def test_config_rebuilds_the_net(name, classes):
    net = net_of(name, classes=classes)
    stored = json.loads(json.dumps(net.config))
    assert stored == net.config
    twin = build(net.name, **stored).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    x, t = batch()
    assert torch.equal(twin(x, t), net(x, t))


@EVERY
def test_gradient_reaches_every_parameter(name):
    net = net_of(name, classes=3)
    x, t = batch()
    net(x, t, label=torch.tensor([0, 1, 2, 3])).square().sum().backward()
    idle = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(name, dtype):
    net = net_of(name, classes=3)
    x, t = batch()
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])  # exact in every dtype
    expected = net(x, t)
    got = net.to(dtype)(x.to(dtype), t.to(dtype))
    assert got.dtype == dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-3)  # float32 phases: 1e-4


@EVERY
def test_autocast(name):
    net = net_of(name)
    x, t = batch()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, t)
    y.float().square().sum().backward()
    expected = net(x, t)
    assert (y.float() - expected).norm() / expected.norm() < 0.05
    assert all(p.grad.isfinite().all() for p in net.parameters())


@EVERY
def test_inputs_are_not_written_to(name):
    net = net_of(name)
    x, t = batch()
    before = x.clone(), t.clone()
    net(x, t)
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


@EVERY
def test_export_with_any_batch(name):
    net = net_of(name, classes=3)
    x, t = batch()
    b = torch.export.Dim("b", min=2, max=64)
    program = torch.export.export(net, (x, t), dynamic_shapes={"x": {0: b}, "t": {0: b}})
    x, t = batch(7)
    torch.testing.assert_close(program.module()(x, t), net(x, t), atol=1e-5, rtol=1e-5)


@EVERY
def test_check_accepts_what_the_net_takes(name):
    net = net_of(name, classes=3)
    x, _ = batch()
    net.check(x)
    net.check(x, label=None)
    net.check(x, label=torch.tensor([0, 1, 2, 3]))
    net.check(x[:0], label=torch.tensor([], dtype=torch.int64))


@EVERY
@pytest.mark.parametrize(
    "label, message",
    [
        (torch.zeros(4, dtype=torch.int32), r"must be int64, got torch.int32: convert"),
        (torch.zeros(4), r"must be int64, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), r"one entry per sample, shape \(4,\), got \(3,\)"),
        (torch.zeros(4, 1, dtype=torch.int64), r"one entry per sample.*got \(4, 1\)"),
        (torch.tensor([0, 1, 2, 4]), r"from 0 to 2 \(3 for none\), got 0 to 4"),
        (torch.tensor([0, 1, 2, -1]), r"from 0 to 2 \(3 for none\), got -1 to 2"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "label is on meta but x on cpu"),
    ],
)
def test_check_names_what_is_wrong_with_a_label(name, label, message):
    net = net_of(name, classes=3)
    with pytest.raises(ValueError, match=message):
        net.check(batch()[0], label=label)


@EVERY
def test_check_names_what_is_wrong(name):
    net = net_of(name)
    x, _ = batch()
    with pytest.raises(ValueError, match=r"shape \(batch, 1, 8, 8\), got \(4, 8, 8\)"):
        net.check(x[:, 0])
    with pytest.raises(ValueError, match=r"shape \(batch, 1, 8, 8\), got \(4, 1, 8, 7\)"):
        net.check(x[..., :7])
    with pytest.raises(ValueError, match=r"floating point, got torch.uint8"):
        net.check(x.to(torch.uint8))
    with pytest.raises(ValueError, match=f"unconditional {name}"):
        net.check(x, label=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"unconditional {name}"):
        net.null_condition(label=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="'label' only, got 'caption'"):
        net.check(x, caption=x)


@pytest.mark.parametrize("kind", [MLP, UNet])
def test_shape_and_classes_are_checked(kind):
    with pytest.raises(ValueError, match=r"shape must list sizes >= 1, got \(1, 0, 8\)"):
        kind(shape=(1, 0, 8))
    with pytest.raises(ValueError, match="classes must be >= 0, got -1"):
        kind(shape=(1, 32, 32), classes=-1)
