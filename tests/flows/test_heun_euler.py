"""Heun with a last Euler step: its count of evaluations, its order, its last step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from rectiflow.flows import Counted, GaussianField, HeunEuler, integrate, uniform_times
from rectiflow.flows.pair_format import describe_solver, solver_of
from rectiflow.flows.solvers import resolve


def field() -> GaussianField:
    return GaussianField(torch.tensor([0.7]).double(), torch.tensor([2.5]).double())


POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_invariant_10_evaluations(steps):
    counted = Counted(field())
    integrate(counted, POINTS, steps, "heun-euler")
    assert counted.evaluations == 2 * steps - 1


def test_invariant_10_the_last_step_is_eulers():
    grid = [0.0, 0.3, 0.9, 1.0]
    before = integrate(field(), POINTS, grid[:-1], "heun")
    wanted = integrate(field(), before, grid[-2:], "euler")
    assert torch.equal(integrate(field(), POINTS, grid, "heun-euler"), wanted)


def test_no_evaluation_at_the_data_end():
    seen = []
    integrate(lambda x, t: seen.append(float(t[0])) or x, POINTS, 5, HeunEuler())
    assert max(seen) < 1


@pytest.mark.parametrize("grid", [[0.0, 0.4, 0.8], [1.0, 0.5, 0.0]])
def test_elsewhere_it_is_heuns_method(grid):
    found = integrate(field(), POINTS, grid, "heun-euler")
    assert torch.equal(found, integrate(field(), POINTS, grid, "heun"))


def test_invariant_10_order():
    errors = [
        float(
            (integrate(field(), POINTS, uniform_times(n), "heun-euler") - field().transport(POINTS))
            .abs()
            .max()
        )
        for n in (100, 200, 400)
    ]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    # The next term of the error moves the slope by O(1/steps).
    assert slopes[-1] == pytest.approx(2, abs=0.15)


def test_one_object_serves_many_integrations():
    solver = resolve("heun-euler")
    first = integrate(field(), POINTS, 4, solver)
    assert torch.equal(integrate(field(), POINTS, 4, solver), first)
    assert solver_of(describe_solver(solver)) == solver
