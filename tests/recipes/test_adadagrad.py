from __future__ import annotations

from pathlib import Path

import pytest
from tests.recipes.quick import run_quick

from rectiflow.recipes.adadagrad import AVERAGE, PRESETS, Trained, _checks


def arm(steps: int, *accuracies: float) -> list[Trained]:
    return [Trained(accuracy, steps, ((0, 16),), 0.0) for accuracy in accuracies]


def states(*accuracies: float, steps: int = 100) -> list[str]:
    arms = {
        "constant 16": arm(1000, 0.9),
        "constant 4096": arm(50, 0.80, 0.81, 0.82),
        AVERAGE: arm(100, 0.82, 0.83, 0.84),
        "norm test, η = 0.5": arm(steps, *accuracies),
    }
    return [check.state for check in _checks(arms, PRESETS["default"])]


def test_checks_are_the_specifications_rules() -> None:
    assert states(0.82, 0.83, 0.84) == ["pass"] * 3
    # Below its own average by less than a standard error of the gap, and by more.
    assert states(0.815, 0.84, 0.83) == ["pass"] * 3
    assert states(0.81, 0.82, 0.83)[0] == "fail"
    # As good as the largest batch.
    assert states(0.80, 0.81, 0.82)[1] == "fail"
    # Above the largest batch, but not by two standard errors.
    assert states(0.80, 0.83, 0.845, steps=900) == ["pass", "fail", "fail"]


def test_preset_is_the_specifications() -> None:
    settings = PRESETS["default"]
    assert (settings.train, settings.size, settings.width) == (12_000, 14, 64)
    assert (settings.budget, settings.b_max) == (240_000, 4096)
    assert 0.03 in settings.rates
    assert min(settings.tuning_seeds) >= 100
    assert {settings.eta, *settings.others} == {0.1, 0.25, 0.5, 1.0}
    assert (len(settings.seeds), settings.tested, settings.interval) == (3, 512, 10)


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    run = run_quick("adadagrad", tmp_path)
    steps = {arm: v[0] for (q, arm), v in run.values.items() if q == "steps"}
    assert steps["constant 16"] == pytest.approx(6000 / 16, abs=1)
    assert steps["constant 512"] <= steps["norm test, η = 0.5"] < steps["constant 16"]
    # As many steps, but for rounding the average to a whole batch.
    assert steps[AVERAGE] == pytest.approx(steps["norm test, η = 0.5"], rel=0.1)
    assert run.pictures == 2
