"""RF-Solver's family and the implicit midpoint rule: what they equal, and how fast errors fall."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.flows import Counted, RFSolver, flux_shift, flux_times, integrate, uniform_times
from rectiflow.flows.implicit_midpoint import ImplicitMidpoint
from rectiflow.flows.pair_format import describe_solver, solver_of
from rectiflow.flows.solvers import resolve

START = torch.sin(0.37 * torch.arange(1, 17, dtype=torch.float64)).unsqueeze(1)
THETAS = (0.3, 0.5, 2 / 3, 0.8, 1.0)


def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The specification's smooth field, whose trajectories bend."""
    return 0.7 * x - 0.4 * torch.sin(3 * x) + torch.cos(2 * t)[:, None]


def slope(solver: object, *, trip: bool) -> float:
    """The exponent of the error at the finer pair of grids, one way or there and back."""
    exact = START if trip else integrate(field, START, 1024, "rk4")
    errors = []
    for steps in (32, 64):
        end = integrate(field, START, steps, solver)
        if trip:
            end = integrate(field, end, uniform_times(steps, start=1, stop=0), solver)
        errors.append(float((end - exact).abs().max()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("backward", [False, True])
def test_invariant_1_half_is_the_midpoint_rule_and_one_is_heuns(backward: bool) -> None:
    import torchdiffeq

    # Uneven, as no step may assume its neighbours.
    grid = [0.0, 0.1, 0.35, 0.6, 1.0][:: -1 if backward else 1]
    for theta, name, peer in ((0.5, "midpoint", "midpoint"), (1.0, "heun", "heun2")):
        found = integrate(field, START, grid, RFSolver(theta))
        assert torch.equal(found, integrate(field, START, grid, name))
        oracle = torchdiffeq.odeint(
            lambda t, x: field(x, t.expand(len(x))),
            START,
            torch.tensor(grid, dtype=torch.float64),
            method=peer,
        )[-1]
        torch.testing.assert_close(found, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("theta", THETAS)
def test_the_theta_form_is_the_expansion_with_a_difference_quotient(theta: float) -> None:
    h, t = 0.25, torch.full((len(START),), 0.5, dtype=torch.float64)
    v = field(START, t)
    rate = (field(START + theta * h * v, t + theta * h) - v) / (theta * h)
    found = integrate(field, START, [0.5, 0.75], f"rf-solver:{theta!r}")
    torch.testing.assert_close(found, START + h * v + h**2 / 2 * rate, rtol=0, atol=1e-14)


@pytest.mark.parametrize("theta", THETAS)
def test_invariant_2_order_two(theta: float) -> None:
    assert slope(RFSolver(theta), trip=False) == pytest.approx(2, abs=0.15)
    assert RFSolver(theta).order == 2


def test_invariant_2_euler_has_order_one_and_implicit_midpoint_two() -> None:
    assert slope("euler", trip=False) == pytest.approx(1, abs=0.15)
    assert slope(ImplicitMidpoint(8), trip=False) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "rf-solver"])
def test_invariant_3_exact_where_it_must_be(solver: str) -> None:
    """Constant velocities are exact for all; second order is also exact for v linear in t."""
    for steps in (1, 3):
        assert torch.allclose(
            integrate(lambda x, t: x * 0 + 2, START, steps, solver), START + 2, atol=1e-14
        )
    end = integrate(lambda x, t: x * 0 + 3 * t[:, None], START, 4, "rf-solver:0.7")
    torch.testing.assert_close(end, START + 1.5, rtol=0, atol=1e-14)


def test_invariant_4_on_straight_flows_it_is_eulers_method() -> None:
    # x (1 + c t) moves at the speed c x(0): constant along every path.
    def straight(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 3 * x / (1 + 3 * t[:, None])

    for theta in THETAS:
        for steps in (1, 5):
            found = integrate(straight, START, steps, RFSolver(theta))
            euler = integrate(straight, START, steps, "euler")
            torch.testing.assert_close(found, euler, rtol=1e-13, atol=0)
            torch.testing.assert_close(found, 4 * START, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "solver, order, slack", [("rf-solver", 3, 0.3), ("heun", 3, 0.3), ("euler", 1, 0.2)]
)
def test_invariant_5_round_trips_gain_an_order_for_even_orders(
    solver: str, order: int, slack: float
) -> None:
    assert slope(solver, trip=True) == pytest.approx(order, abs=slack)


def test_implicit_midpoint_returns_to_the_start() -> None:
    errors = []
    for iterations in (1, 3, 30):
        there = integrate(field, START, 10, ImplicitMidpoint(iterations))
        back = integrate(
            field, there, uniform_times(10, start=1, stop=0), f"implicit-midpoint:{iterations}"
        )
        errors.append(float((back - START).abs().max()))
    # Each iteration gains a factor of about h L / 2, where L is 1.9 at most.
    assert errors[1] < errors[0] * 0.095**2 * 2
    assert errors[2] < 1e-14


def test_one_iteration_is_the_explicit_midpoint() -> None:
    found = integrate(field, START, 7, ImplicitMidpoint(1))
    assert torch.equal(found, integrate(field, START, 7, "midpoint"))


@pytest.mark.parametrize("solver, calls", [("rf-solver", 2), ("implicit-midpoint:4", 5)])
def test_invariant_6_evaluations(solver: str, calls: int) -> None:
    counted = Counted(field)
    integrate(counted, START, 9, solver)
    assert counted.evaluations == 9 * calls


def test_sampling_never_asks_at_the_end_but_inversion_begins_there() -> None:
    seen: list[float] = []

    def watch(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return field(x, t)

    integrate(watch, START, 4, "rf-solver")
    assert max(seen) == 0.875
    seen.clear()
    integrate(watch, START, uniform_times(4, start=1, stop=0), "rf-solver")
    assert seen[0] == 1.0
    assert min(seen) == 0.125


def test_invariant_9_the_schedule_of_flux() -> None:
    levels = [1 - t for t in flux_times(4, 1024)]
    expected = [1, 0.84923482, 0.65248942, 0.38494474, 0]
    # The reference was computed in single precision.
    assert levels == pytest.approx(expected, abs=1e-7)
    assert flux_times(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-15)
    assert [math.log(flux_shift(n)) for n in (256, 4096, 7936)] == pytest.approx([0.5, 1.15, 1.8])


def test_invariant_10_the_theta_form_keeps_digits_in_half_precision() -> None:
    def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return field(x.bfloat16(), t.bfloat16())

    exact = integrate(field, START, 64, "rf-solver")
    found = integrate(half, START.bfloat16(), 64, "rf-solver").double()
    state, h = START.bfloat16(), 1 / 64
    for index in range(64):
        t = torch.full((len(state),), index * h)
        v = half(state, t)
        rate = (half(state + h / 2 * v, t + h / 2) - v) / (h / 2)
        state = state + h * v + h**2 / 2 * rate
    quotient = (state.double() - exact).square().mean()
    assert (found - exact).square().mean() <= quotient


def test_specs_round_trip_and_wrong_ones_are_refused() -> None:
    for solver in (RFSolver(), RFSolver(0.667), ImplicitMidpoint(5), resolve("implicit-midpoint")):
        assert solver_of(describe_solver(solver)) == solver
        assert resolve(solver.spec) == solver
    for theta in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"theta must be in \(0, 1\]"):
            RFSolver(theta)
    with pytest.raises(ValueError, match="rf-solver:half is not understood"):
        resolve("rf-solver:half")
    with pytest.raises(ValueError, match="iterations must be > 0, got 0"):
        resolve("implicit-midpoint:0")
    with pytest.raises(ValueError, match="the solver 'heun' takes no number"):
        resolve("heun:2")
    with pytest.raises(ValueError, match="did you mean 'rf-solver'"):
        resolve("rf-solve")


def test_gradients_flow() -> None:
    x = START[:3].clone().requires_grad_()
    for solver in (RFSolver(0.7), ImplicitMidpoint(2)):
        assert torch.autograd.gradcheck(lambda s, r=solver: integrate(field, s, 3, r), (x,))
