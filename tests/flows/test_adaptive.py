import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from rectiflow.flows import Counted, DormandPrince, FlowModel, GaussianField, integrate
from rectiflow.flows.adaptive import DOPRI5, ERROR_WEIGHTS
from rectiflow.flows.path_registry import PATHS, build


def swirl(x, t):
    """A field with a fast and a slow part, written for tensors and arrays alike."""
    module = torch if isinstance(x, torch.Tensor) else np
    a, b = x[..., 0], x[..., 1]
    return module.stack([-8 * b + module.cos(9 * t), 8 * a - a * b * b], -1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_equals_scipy(tolerance, backward):
    span = (1.0, 0.0) if backward else (0.0, 1.0)
    start = np.array([[1.0, 0.5], [0.2, -0.3]])
    peer = solve_ivp(
        lambda t, y: swirl(y.reshape(2, 2), t).reshape(-1),
        span,
        start.reshape(-1),
        method="RK45",
        rtol=tolerance,
        atol=tolerance,
    )
    field = Counted(swirl)
    found = integrate(
        field, torch.from_numpy(start), span, DormandPrince(rtol=tolerance, atol=tolerance)
    )
    # The same pair and the same step control: only rounding differs.
    wanted = torch.from_numpy(peer.y[:, -1].reshape(2, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert field.evaluations == peer.nfev


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_invariant_1_error_stays_near_the_tolerance(tolerance):
    field = GaussianField(torch.tensor([0.7]).double(), torch.tensor([2.5]).double())
    z = torch.linspace(-3, 3, 31, dtype=torch.float64).unsqueeze(1)
    found = integrate(field, z, [0.0, 1.0], DormandPrince(rtol=tolerance, atol=tolerance))
    # Local errors add up over some ten steps.
    assert (found - field.transport(z)).abs().max() < 30 * tolerance


def test_invariant_5_forward_then_backward_returns():
    field = GaussianField(torch.tensor([0.7]).double(), torch.tensor([0.3]).double())
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    there = integrate(field, z, [0.0, 1.0], "dopri5")
    back = integrate(field, there, [1.0, 0.0], "dopri5")
    assert (back - z).abs().max() < 1e-3
    assert (there - z).abs().max() > 1


def test_tableau_is_consistent():
    for node, row in zip(DOPRI5.nodes, DOPRI5.matrix):
        assert math.fsum(row) == pytest.approx(node, abs=1e-14)
    assert math.fsum(DOPRI5.weights) == pytest.approx(1, abs=1e-15)
    assert math.fsum(ERROR_WEIGHTS) == pytest.approx(0, abs=1e-15)
    assert DOPRI5.matrix[-1] == DOPRI5.weights[:-1]


def test_the_last_slope_is_the_first_of_the_next_interval():
    whole, cut = Counted(swirl), Counted(swirl)
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    solver = DormandPrince(rtol=1e-6, atol=1e-6)
    one = integrate(whole, x, [0.0, 1.0], solver)
    two = integrate(cut, x, [0.0, 0.5, 1.0], solver)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    # Two evaluations start the first interval; none is repeated at the seam.
    assert (cut.evaluations - 2) % 6 == 0
    assert cut.evaluations <= whole.evaluations + 12


@pytest.mark.parametrize("grid", [[0.0, 1.0], [1.0, 0.0], [0.4, 0.5]], ids=str)
def test_the_first_trial_stays_within_the_interval(grid):
    seen = []

    def slow(x, t):
        seen.append(t[0].item())
        return 1e-9 * x

    integrate(slow, torch.ones(1, 1, dtype=torch.float64), grid, "dopri5")
    assert min(grid) <= min(seen)
    assert max(seen) <= max(grid)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_every_path_can_be_followed(name):
    field = GaussianField(torch.tensor([0.5]), torch.tensor([0.8]), build(name))
    z = torch.linspace(-2, 2, 5).unsqueeze(1)
    start = field.path.start(z)
    found = integrate(field, start, [0.0, 0.999], "dopri5")
    torch.testing.assert_close(found, field.transport(start, 0.0, 0.999), rtol=1e-2, atol=1e-2)


def test_times_keep_their_precision_for_half_states():
    seen = []

    def net(x, t):
        seen.append(t.dtype)
        return -x

    x = torch.ones(1, 1, dtype=torch.bfloat16)
    integrate(FlowModel(net), x, 2, DormandPrince(1e-1, 1e-1), correctors=(lambda s: s.after,))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fields_that_are_never_finite_end_at_once(bad):
    field = Counted(lambda x, t: x * bad)
    with pytest.raises(RuntimeError, match="dopri5 cannot go on at t=0: the velocity is not fin"):
        integrate(field, torch.ones(2, 1), [0.0, 1.0], "dopri5")
    assert field.evaluations == 1
    later = Counted(lambda x, t: torch.where(t[:, None] > 0, x * bad, x))
    with pytest.raises(RuntimeError, match="dopri5 cannot go on"):
        integrate(later, torch.ones(2, 1), [0.0, 1.0], "dopri5")
    assert later.evaluations < 300


def test_half_precision_and_no_samples():
    found = integrate(
        lambda x, t: -x, torch.ones(2, 1).half(), [0.0, 1.0], DormandPrince(1e-2, 1e-2)
    )
    assert found.dtype == torch.float16
    assert found[0].item() == pytest.approx(math.exp(-1), abs=5e-3)
    assert integrate(lambda x, t: -x, torch.ones(0, 1), [0.0, 1.0], "dopri5").shape == (0, 1)


def test_hopeless_fields_end_with_a_reason():
    x = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match=r"dopri5 cannot go on at t=0\.5"):
        integrate(lambda x, t: x / (t[:, None] < 0.5), x, [0.0, 1.0], "dopri5")
    with pytest.raises(RuntimeError, match="dopri5 used 3 steps between t=0 and t=1"):
        integrate(swirl, torch.ones(1, 2), [0.0, 1.0], DormandPrince(1e-6, 1e-6, max_steps=3))
    with pytest.raises(ValueError, match="rtol must be > 0"):
        DormandPrince(rtol=0.0)
