"""Invariant 7 of 2-rectified flow++: training in the paper's time gives the same gradients."""

from __future__ import annotations

import torch

from rectiflow.flows import L2, FlowModel, PseudoHuber
from rectiflow.flows.couplings import Draw, Pairs
from rectiflow.nets import build
from rectiflow.training import FlowMatching


class Fixed:
    """Given pairs, in order."""

    def __init__(self, source, target):
        self.source, self.target = source, target

    def draw(self, draw):
        return Pairs(self.source, self.target)


class Given:
    """Given times."""

    def __init__(self, t):
        self.t = t

    def sample(self, count, *, generator=None):
        return self.t


def test_invariant_7_both_conventions_give_one_gradient():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 32, 3, generator=generator, dtype=torch.float64)
    # Multiples of 1/256, so that 1 - t is exact.
    t = torch.randint(1, 256, (32,), generator=generator).double() / 256
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(3,), width=16, depth=1, zero=False).double()
    c = 0.00054 * 3
    for premetric in (L2(), PseudoHuber()):
        method = FlowMatching(FlowModel(net), Fixed(source, target), Given(t), premetric)
        ours = torch.autograd.grad(method.loss(Draw.of(32)), list(net.parameters()))
        # Theirs: t = 1 is noise, z_t = (1 - t) x + t z, and the network outputs z - x.
        s = (1 - t)[:, None]
        difference = -net((1 - s) * target + s * source, 1 - s[:, 0]) - (source - target)
        if isinstance(premetric, L2):
            loss = difference.square().mean(1)
        else:
            loss = ((difference.square().sum(1) + c**2).sqrt() - c) / 3
        theirs = torch.autograd.grad(loss.mean(), list(net.parameters()))
        for a, b in zip(ours, theirs):
            # Huber is written in two ways, which cancel differently.
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
