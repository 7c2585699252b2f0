import math
from itertools import pairwise

import pytest
import torch

from rectiflow.flows import GaussianField, integrate, uniform_times
from rectiflow.flows.solvers import EULER, RungeKutta, names, resolve

FIXED = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def gaussian():
    return GaussianField(torch.tensor([0.7]).double(), torch.tensor([2.5]).double())


def points(count=16):
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slopes(field, x, exact, begin, end, solver):
    """Exponents by which the error falls when the steps are halved, and halved again."""
    errors = []
    for steps in (25, 50, 100):
        grid = uniform_times(steps, start=begin, stop=end)
        errors.append((integrate(field, x, grid, solver) - exact).abs().max())
    return [math.log2(before / after) for before, after in pairwise(errors)]


@pytest.mark.parametrize("solver, order", FIXED.items())
@pytest.mark.parametrize("begin, end", [(0.0, 1.0), (1.0, 0.0)])
def test_error_falls_with_the_order(solver, order, begin, end):
    angle = torch.atan(torch.linspace(-0.6, 0.2, 9, dtype=torch.float64)).unsqueeze(1)
    x, exact = (torch.tan(angle + math.sin(time)) for time in (begin, end))
    found = slopes(lambda s, t: (1 + s**2) * t.cos()[:, None], x, exact, begin, end, solver)
    assert resolve(solver).order == order
    # The next term of the error moves the slope by O(1/steps).
    assert found[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver, order", FIXED.items())
@pytest.mark.parametrize("begin, end", [(0.2, 1.0), (1.0, 0.2)])
def test_invariant_1_error_falls_with_the_order(solver, order, begin, end):
    field, z = gaussian(), points()
    found = slopes(field, z, field.transport(z, begin, end), begin, end, solver)
    # The leading error of the midpoint method happens to cancel on this field: it gains an order.
    gained = 1 if solver == "midpoint" else 0
    assert found[-1] == pytest.approx(order + gained, abs=0.15)


def test_invariant_1_the_map_is_known():
    field, z = gaussian(), points()
    torch.testing.assert_close(field.transport(z), 0.7 + 2.5 * z)
    found = integrate(field, z, 100, "rk4")
    torch.testing.assert_close(found, 0.7 + 2.5 * z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", FIXED)
def test_forward_then_backward_returns(solver):
    field, z = gaussian(), points()
    there = integrate(field, z, 100, solver)
    back = integrate(field, there, uniform_times(100, start=1, stop=0), solver)
    assert (back - z).abs().max() < {1: 0.2, 2: 2e-3, 4: 1e-7}[FIXED[solver]]
    assert (there - z).abs().max() > 1


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_gradients_flow_through_every_step(solver):
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def end(x, w):
        return integrate(lambda s, t: torch.sin(w * s) + t[:, None], x, 5, solver)

    x = points(3).requires_grad_()
    # The adaptive steps move with the input, so differences of it are only as good as its error.
    loose = {"atol": 1e-4, "rtol": 1e-3} if solver == "dopri5" else {}
    assert torch.autograd.gradcheck(end, (x, weight), **loose)


@pytest.mark.parametrize("solver", FIXED)
def test_one_step_by_the_tableau(solver):
    def velocity(x, t):
        return x * t[:, None] + 1

    x, h = torch.tensor([[2.0]]).double(), 0.5
    grid = torch.tensor([0.25, 0.75]).double()

    def v(state, t):
        return velocity(state, torch.tensor([t]).double())

    k1 = v(x, 0.25)
    if solver == "euler":
        wanted = x + h * k1
    elif solver == "midpoint":
        wanted = x + h * v(x + h / 2 * k1, 0.5)
    elif solver == "heun":
        wanted = x + h / 2 * (k1 + v(x + h * k1, 0.75))
    else:
        k2 = v(x + h / 2 * k1, 0.5)
        k3 = v(x + h / 2 * k2, 0.5)
        k4 = v(x + h * k3, 0.75)
        wanted = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(integrate(velocity, x, grid, solver), wanted)


def test_legacy_steps_are_one_over_n():
    legacy = RungeKutta(EULER.nodes, EULER.matrix, EULER.weights, 1, legacy_dt=True)
    grid = uniform_times(4, start=1e-3)
    one = torch.zeros(1, 1, dtype=torch.float64)
    assert integrate(lambda x, t: x * 0 + 1, one, grid, legacy).item() == 1.0
    assert integrate(lambda x, t: x * 0 + 1, one, grid).item() == pytest.approx(0.999, rel=1e-12)
    assert integrate(lambda x, t: x * 0 + 1, one, grid[::-1], legacy).item() == -1.0
    seen = []
    integrate(lambda x, t: seen.append(t.item()) or x, one, grid, legacy)
    assert seen == pytest.approx(grid[:-1])


def test_names_resolve_and_others_are_refused():
    for name in names():
        assert resolve(name).order >= 1
    assert resolve(EULER) is EULER
    with pytest.raises(ValueError, match="unknown solver 'huen': did you mean 'heun'"):
        resolve("huen")
