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


def found(
    ends: dict[str, float], held: float, difference: float, memory: float, colour: float = -0.033
) -> Found:
    arms = {
        arm: Arm({REWARD: value, HELD_OUT: held, JUDGE: 0, DIVERSITY: 1}, [], torch.zeros(1))
        for arm, value in ends.items()
    }
    arms[BEFORE].scores[HELD_OUT] = -9.0
    colours = {BEFORE: -0.4, LAST: colour - 0.007, NORMAL: colour, UNIFORM: colour}
    return Found(arms, colours, difference, {True: (100, int(100 * memory)), False: (100, 400)})


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
    # As good as the policy gradient, and no help for other classes.
    same = {**ends, POLICY: ends[NORMAL], POLICY_MORE: ends[NORMAL]}
    states = [c.state for c in _checks([found(same, -9.0, 0.0, 1.1)] * 3)]
    assert [states[place] for place in (0, 1, 4)] == ["fail"] * 3
    # Colours worse than before, by every rule alike.
    assert _checks([found(ends, -5.0, 0.0, 1.1, colour=-0.9)])[6].state == "fail"


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
