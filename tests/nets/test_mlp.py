from __future__ import annotations

import pytest
import torch

from rectiflow.nets import MLP


def test_equals_the_formula():
    net = MLP(shape=(3,), width=8, depth=2, classes=2, time_features=4, activation="tanh")
    torch.nn.init.normal_(net.head.weight)
    x, t, label = torch.randn(5, 3), torch.rand(5), torch.tensor([0, 1, 2, 1, 0])
    e = torch.tanh(net.time_in(net.time(t)) + net.label(label))
    h = net.stem(x)
    for k, block in enumerate(net.blocks):
        rows = slice(8 * k, 8 * k + 8)
        shift = e @ net.shift.weight[rows].T + net.shift.bias[rows]
        h = h + torch.tanh(h @ block.inner.weight.T + shift) @ block.outer.weight.T
        h = h + block.outer.bias
    # float32, sums of at most 8 terms.
    torch.testing.assert_close(net(x, t, label=label), net.head(h), atol=1e-5, rtol=1e-5)


def test_gradients_in_double_precision():
    net = MLP(shape=(2,), width=6, depth=1, time_features=4, zero=False).double()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    # Phases run a thousand times faster than t: small steps for the finite differences.
    t = torch.rand(3, dtype=torch.float64)
    weights = list(net.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: net(x, t), (x, *weights))
    t.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda t: net(x.detach(), t), (t,), eps=1e-9, atol=1e-4)


def test_dropout_only_while_training():
    net = MLP(shape=(2,), width=64, depth=1, dropout=0.5, zero=False)
    x, t = torch.randn(4, 2), torch.rand(4)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("bad", [{"width": 0}, {"depth": 0}, {"time_features": 5}])
def test_sizes_are_checked(bad):
    with pytest.raises(ValueError, match=f"got {next(iter(bad.values()))}"):
        MLP(shape=(2,), **bad)


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'sillu': did you mean 'silu'"):
        MLP(shape=(2,), activation="sillu")
