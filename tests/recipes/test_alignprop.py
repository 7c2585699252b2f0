from __future__ import annotations

from pathlib import Path

import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes.alignment_lab import (
    BEFORE,
    DIVERSITY,
    FULL,
    HELD_OUT,
    JUDGE,
    LAST,
    NORMAL,
    POLICY,
    POLICY_MORE,
    REWARD,
    UNIFORM,
    Arm,
    Found,
)
from rectiflow.recipes.alignprop import PRESETS, _checks


def found(ends: dict[str, float], held: float, difference: float, memory: float) -> Found:
    arms = {
        arm: Arm({REWARD: value, HELD_OUT: held, JUDGE: 0, DIVERSITY: 1}, [], torch.zeros(1))
        for arm, value in ends.items()
    }
    arms[BEFORE].scores[HELD_OUT] = -9.0
    colour = {BEFORE: -0.4, LAST: -0.04, NORMAL: -0.033, UNIFORM: -0.033}
    return Found(arms, colour, difference, {True: (100, int(100 * memory)), False: (100, 400)})


def test_checks_are_the_specifications_rules() -> None:
    ends = {
        BEFORE: -9.9, LAST: -0.65, NORMAL: -0.25, UNIFORM: -0.2, FULL: -0.19, POLICY: -9.0,
        POLICY_MORE: -5.0,
    }  # fmt: skip
    good = found(ends, -5.0, 0.0, 1.1)
    assert [c.state for c in _checks([good] * 3)] == ["pass"] * 7
    worse = {**ends, NORMAL: -0.7, POLICY: -0.6, POLICY_MORE: -0.5}
    states = [c.state for c in _checks([found(worse, -9.5, 1e-3, 1.5)] * 3)]
    assert states == ["fail"] * 6 + ["pass"]
    small = found({**ends, LAST: -0.3}, -5.0, 0.0, 1.1)
    assert _checks([good, small])[5].state == "weak"


def test_presets_are_those_of_the_specification() -> None:
    settings = PRESETS["default"]
    assert len(settings.seeds) >= 3
    assert (settings.chain, settings.batch_size, settings.updates) == (20, 64, 40)
    assert (settings.rank, settings.learning_rate) == (4, 1e-3)
    assert (settings.policy_factor, settings.memory_steps) == (10, (10, 40))


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("alignprop", tmp_path)
    arms = {arm for quantity, arm in found.values if quantity == f"meaning: {REWARD}"}
    assert arms == {BEFORE, LAST, NORMAL, UNIFORM, FULL, POLICY, POLICY_MORE}
    assert len(found.table["checks"]) == 7
    assert found.table["checks"][2]["values"] == [0.0], "gradients are equal to the last bit"
    assert found.pictures == 2
