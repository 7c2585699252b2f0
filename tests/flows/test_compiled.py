import functools

import pytest
import torch
from torch import nn

from rectiflow.flows import CompiledSampler, FlowModel, integrate, uniform_times


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x, t, *, label):
        return torch.tanh(self.inner(torch.cat([x, t[:, None]], 1))) + label[:, None]


@torch.no_grad()
def check(grids):
    torch.manual_seed(0)
    model, x, label = FlowModel(Tiny().eval()), torch.randn(4, 2), torch.rand(4)
    sampler = CompiledSampler(model, "euler", steps_per_call=2)
    for grid in grids:
        found = sampler(x, grid, label=label)
        wanted = integrate(model, x, grid, "euler", label=label)
        # Fused kernels round differently.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_equals_integrate():
    # Four steps fill two calls of one compiled function; so does the way back.
    check([uniform_times(4), [1.0, 0.5, 0.0]])


def test_a_rest_of_steps_is_taken(monkeypatch):
    # The graph is captured as above, but run without a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    check([[0.1, 0.2, 0.5, 0.9], [1.0, 0.5]])


def test_only_fixed_steps_can_be_unrolled():
    with pytest.raises(ValueError, match="only fixed-step Runge-Kutta solvers can be unrolled"):
        CompiledSampler(lambda x, t: x, "dopri5")
    with pytest.raises(ValueError, match="steps_per_call must be > 0"):
        CompiledSampler(lambda x, t: x, steps_per_call=0)
