import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from rectiflow.flows import FlowModel, adaptive_times, integrate, sample, uniform_times
from rectiflow.flows.adaptive_grid import error_density
from rectiflow.nets import build


class Sharp(nn.Module):
    """`v = rate exp(-rate t)`: all bending sits near t = 0; the flow adds `1 - exp(-rate)`."""

    def __init__(self, rate=12.0):
        super().__init__()
        self.rate = rate

    def forward(self, x, t):
        return (self.rate * (-self.rate * t).exp())[:, None].expand_as(x)


def model(rate=12.0):
    return FlowModel(Sharp(rate).double(), shape=(2,))


def source(count=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def test_times_are_those_of_the_known_density():
    # |dv/dt| = rate² exp(-rate t), so the density is exp(-rate t / 2) up to scale.
    times = adaptive_times(model(), 5, source=source(), fine=400, uniform=0.0)
    total = 1 - math.exp(-6.0)
    wanted = [-math.log(1 - i / 5 * total) / 6 for i in range(5)] + [1.0]
    # Cells of 1/400 shift a cut by less than one cell.
    assert times == pytest.approx(wanted, abs=2.5e-3)


def test_it_beats_equal_steps_at_the_same_number():
    exact = source() + 1 - math.exp(-12.0)
    for steps in (4, 16):
        times = adaptive_times(model(), steps, source=source())
        fitted = (integrate(model(), source(), times) - exact).abs().max()
        equal = (integrate(model(), source(), steps) - exact).abs().max()
        assert fitted < 0.5 * equal


def test_local_errors_are_equal():
    times = adaptive_times(model(), 8, source=source(), fine=400, uniform=0.0)

    def value(t):
        return -math.exp(-12 * t)

    errors = [12 * math.exp(-12 * a) * (b - a) - (value(b) - value(a)) for a, b in pairwise(times)]
    # The last, long step is beyond the small-step formula.
    assert max(errors[:5]) / min(errors[:5]) < 1.3


def test_straight_flows_get_equal_steps():
    straight = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
    assert adaptive_times(straight, 4, source=source()) == pytest.approx(uniform_times(4))
    assert adaptive_times(model(), 4, source=source(), uniform=1.0) == pytest.approx(
        uniform_times(4)
    )


def test_density_does_not_depend_on_the_time_scale_of_the_measurement():
    coarse, fine = (error_density(model(3.0), source(), n) for n in (50, 200))
    assert coarse.mean().item() == pytest.approx(fine.mean().item(), rel=0.02)


def test_times_rise_from_zero_to_one():
    for steps in (1, 2, 150):
        times = adaptive_times(model(), steps, source=source())
        assert len(times) == steps + 1
        assert (times[0], times[-1]) == (0.0, 1.0)
        assert all(b > a for a, b in pairwise(times))


def test_the_generator_decides():
    net = build("mlp", shape=(2,), width=8, depth=1, zero=False)
    made = FlowModel(net, shape=(2,))
    first, second, third = (
        adaptive_times(made, 4, samples=16, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    )
    assert first == second != third


def test_times_are_kept_with_the_model(tmp_path):
    net = build("mlp", shape=(2,), width=8, depth=1, zero=False)
    made = FlowModel(net, shape=(2,))
    times = adaptive_times(made, 3, generator=torch.Generator().manual_seed(0))
    made.sampling["steps"] = times
    made.save_pretrained(tmp_path / "model")
    again = FlowModel.from_pretrained(tmp_path / "model")
    assert again.sampling["steps"] == times
    z = source().float()
    wanted = sample(made, source=z, steps=times)
    torch.testing.assert_close(sample(again, source=z), wanted)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="steps must be > 0, got 0"):
        adaptive_times(model(), 0)
    with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\], got 2"):
        adaptive_times(model(), 2, uniform=2.0)
    with pytest.raises(ValueError, match="fine must be >= 2"):
        adaptive_times(model(), 2, fine=1)
    broken = FlowModel(lambda x, t: x / 0, shape=(2,))
    with pytest.raises(ValueError, match="velocities are not finite"):
        adaptive_times(broken, 2, source=source())
