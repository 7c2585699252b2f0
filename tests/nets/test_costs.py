"""Parameters and multiply-adds, by hand and as published."""

from __future__ import annotations

import pytest
import torch

from rectiflow import nets
from rectiflow.nets import MLP, UNet

PARAMETERS = {
    "unet-cifar10": 61_804_419,
    "unet-28m": 27_906_179,
    "unet-16m": 15_707_235,
    "unet-7m": 6_989_891,
    "unet-3m": 3_437_123,
}
BILLIONS = {"unet-cifar10": 10.3, "unet-28m": 6.6, "unet-16m": 3.7}


def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return nets.build(name, shape=(3, 32, 32))


@pytest.mark.parametrize("name", PARAMETERS)
def test_invariant_9_parameters_of_the_size_table(name):
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", BILLIONS)
def test_invariant_9_multiply_adds_of_the_size_table(name):
    found = nets.cost(on_meta(name))
    assert found.parameters == PARAMETERS[name]
    # One digit after the point is published. The published numbers leave out attention and the
    # time embedding, 5 % of the whole.
    assert found.convolutions / 1e9 == pytest.approx(BILLIONS[name], abs=0.05)
    assert found.macs == pytest.approx(found.convolutions, rel=0.06)


def test_multiply_adds_of_an_mlp_by_hand():
    net = MLP(shape=(1, 8, 8), width=32, depth=2, time_features=16)
    by_hand = 16 * 16 + 16 * 64 + 64 * 32 + 2 * 2 * 32 * 32 + 32 * 64
    assert nets.macs(net) == by_hand
    assert nets.cost(net).convolutions == 0


def test_multiply_adds_of_a_convolution_by_hand():
    class Blur(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x, t, *, label):
            return self.conv(x) * label

    found = nets.cost(Blur(), (3, 10, 12), label=torch.tensor(2))
    assert found == nets.Cost(3 * 5 * 9 + 5, 10 * 12 * 3 * 5 * 9, 10 * 12 * 3 * 5 * 9)


def test_counting_changes_nothing():
    net = UNet(shape=(1, 8, 8), width=8, multipliers=(1, 2), blocks=1, attention=(8,))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first = nets.macs(net)
    assert first == nets.macs(net)
    assert nets.macs(net, (1, 16, 16)) > 3 * first
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert next(net.parameters()).device.type == "cpu"


def test_a_net_without_shape_needs_one():
    with pytest.raises(ValueError, match="give shape="):
        nets.macs(torch.nn.Linear(2, 2))
