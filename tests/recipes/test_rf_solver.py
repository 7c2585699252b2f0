from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes import rf_solver
from rectiflow.recipes.edit_curves import Curves, Point, advantage, largest_rise
from rectiflow.recipes.inversion_errors import RELEASED, SOLVERS, Orders, orders, psnr
from rectiflow.recipes.rf_solver import Found, Settings, _checks


def trade(injected: dict[int, tuple[float, float]]) -> Curves:
    """Plain edits from distance 0.2 at accuracy 0.2 to 0.6 at 0.9."""
    return Curves(
        {n: Point(*one) for n, one in injected.items()},
        {0.0: Point(0.2, 0.2), 2.0: Point(0.6, 0.9)},
        torch.zeros(0),
    )


GOOD = {0: (0.6, 0.9), 2: (0.4, 0.8), 15: (0.2, 0.3)}


def states(injected: dict[int, tuple[float, float]] = GOOD, **changes: float) -> list[str]:
    """States of the checks for plausible numbers, with changes."""
    found = {"one": 2.0, "trip": 3.0, "back": 1.0, "lost": 1.0, "gain": 6.0, **changes}
    lost = {steps: found["lost"] * error for steps, error in RELEASED.items()}
    solved = {
        "RF-Solver": Orders(found["one"], found["trip"], lost),
        "Euler": Orders(1.0, found["back"], lost),
    }
    errors = {
        "RF-Solver": {20: 0.01, 40: 0.001},
        "Euler": {20: 0.01 * 10 ** (found["gain"] / 10), 40: 1.0},
    }
    everything = Found(solved, [errors], [trade(injected)])
    budgets = replace(Settings().inversion, budgets=(10, 20, 40))
    errors["RF-Solver"][10] = errors["Euler"][10] = 0.1
    return [check.state for check in _checks(everything, replace(Settings(), inversion=budgets))]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert set(states()) == {"pass"}
    assert states(one=1.75)[0] == "weak"
    assert states(one=1.65)[0] == "fail"
    assert states(trip=2.5)[1] == "weak"
    assert states(back=1.6)[2] == "fail"
    assert states(lost=1.06)[3] == "fail"
    assert states(gain=2.0)[4] == "weak"
    assert states(gain=-0.1)[4] == "fail"
    assert states({0: (0.3, 0.9), 2: (0.4, 0.8)})[5] == "fail"
    assert states({0: (0.6, 0.8), 2: (0.4, 0.9)})[6] == "fail"
    # As far from the source as plain edits of the same accuracy: 0.2 + 0.4 (0.55 - 0.2) / 0.7.
    assert states({0: (0.6, 0.9), 2: (0.4, 0.55)})[7] == "fail"
    assert states({0: (0.6, 0.9), 2: (0.395, 0.55)})[7] == "weak"
    # An injection that changes nothing.
    assert states({0: (0.6, 0.9), 2: (0.6, 0.9), 15: (0.6, 0.9)})[5:] == ["fail", "pass", "fail"]
    # No point within reach of the plain curve says nothing.
    assert states({0: (0.6, 0.9), 2: (0.4, 0.1)})[7] == "fail"


def test_advantage_compares_at_equal_accuracy() -> None:
    assert advantage(trade({0: (9.0, 0.5), 2: (0.2, 0.55)})) == pytest.approx(2.0)
    assert math.isnan(advantage(trade({0: (0.5, 0.5), 2: (0.4, 0.1)})))
    assert largest_rise([3.0, 2.0, 1.5]) == -0.5
    assert psnr(4.0) == 0


def test_orders_and_errors_of_the_released_code() -> None:
    found = {name: orders(solver) for name, solver in SOLVERS.items()}
    assert found["RF-Solver"].one_way == pytest.approx(2, abs=0.15)
    assert found["RF-Solver"].trip == pytest.approx(3, abs=0.3)
    assert found["Euler"].trip == pytest.approx(1, abs=0.2)
    for steps, error in RELEASED.items():
        # Published with two or three digits.
        assert found["RF-Solver"].lost[steps] == pytest.approx(error, rel=0.05)


def test_default_has_three_seeds_and_the_papers_steps() -> None:
    default = rf_solver.PRESETS["default"]
    assert default.inversion.seeds == default.edit.seeds == (0, 1, 2)
    assert (default.edit.steps, default.edit.guidance) == (15, 2.0)
    assert default.edit.inject == (0, 2, 5, default.edit.steps)
    assert default.inversion.budgets == (10, 20, 40, 60)


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("rf-solver", tmp_path)
    assert len(found.table["checks"]) == 8
    assert found.arms >= {*SOLVERS, "0 injected steps"}
    for quantity in ("distance to the source", "edits of the target class"):
        assert (
            found.values[quantity, "0 injected steps"]
            == found.values[quantity, "plain, guidance 2"]
        )
    assert found.pictures == 3
