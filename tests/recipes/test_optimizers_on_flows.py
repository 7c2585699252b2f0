"""The rules by hand, equal budgets and the quick preset."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.recipes.quick import run_quick

from rectiflow.recipes.optimizers_on_flows import (
    BASES,
    DECAYED,
    PRESETS,
    RATES,
    Settings,
    Trained,
    _checks,
    _numbers,
    _train,
)
from rectiflow.training import optimizers
from rectiflow.training.data import load


def test_every_optimizer_of_the_trainer_is_in_the_table():
    assert set(RATES) == set(optimizers._BUILDERS)
    assert set(BASES) | set(BASES.values()) == set(RATES)
    assert all(len(grid) == 3 for grid in RATES.values())
    with pytest.raises(ValueError, match="equally many learning rates"):
        Settings(rates={"adam": (1e-3, 3e-3), "sgd": (0.1,)})


def test_each_is_compared_with_what_it_starts_from():
    def arm(loss: float) -> list[Trained]:
        return [Trained((1,), (loss,), (1.0,))] * 2

    arms = {"adam": arm(1.0), "adamw": arm(1.005), "diffgrad": arm(0.9), "sgd": arm(2.0)}
    arms["sgdp"] = arm(2.2)
    arms["clipped-adam"] = arm(1.0)
    states = {check.name.split(", ")[1]: check.state for check in _checks(arms)}
    assert states == {
        "adamw / adam": "weak",
        "diffgrad / adam": "pass",
        "clipped-adam / adam": "weak",  # the same loss is not lower
        "sgdp / sgd": "fail",
    }
    arms["sgd"] = arm(100.0)
    assert _checks(arms)[-1].state == "fail"
    assert {"adamw", "adamp", "sophiag", "sophiah"} == DECAYED


def test_a_training_that_diverges_counts_as_100_at_every_look():
    settings = PRESETS["quick"]
    images, held = (replace(load("digits", split=s), labels=None) for s in ("train", "test"))
    found = _train(settings, "sgd", 1e30, 0, images, held)
    assert found.diverged
    assert (found.looks, found.losses) == ((4, 8), (100.0, 100.0))
    fine = Trained((4, 8), (2.0, 1.0), (1.0, 2.0))
    numbers = _numbers({"adam": [fine], "sgd": [found]}, SimpleNamespace(name="fd"))
    values = {(n.quantity, n.arm): n.values[0] for n in numbers}
    assert values["held-out loss at step 4", "sgd"] == 100
    assert math.isnan(values["fd", "sgd"])


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("optimizers-on-flows", tmp_path)
    assert found.arms == set(PRESETS["quick"].rates)
    assert found.pictures == 2
    assert found.values["seconds of training / Adam's", "adam"] == [1.0]
    assert all(0 < values[0] < 100 for (name, _), values in found.values.items() if "loss" in name)


def test_paper_preset_is_at_scale():
    assert PRESETS["paper"].training.steps == 100_000
    assert replace(PRESETS["paper"].training.optim).schedule == "cosine"
