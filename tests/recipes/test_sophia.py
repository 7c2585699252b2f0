"""The two valleys step by step, the rules and the quick preset."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes.sophia import (
    ADAMW,
    NEVER,
    NEWTON,
    SOPHIA,
    Settings,
    Trained,
    _checks,
    steps_taken,
    two_valleys,
)


def test_valleys_have_their_minimum_where_the_paper_says():
    assert float(two_valleys(torch.tensor([1.0, 4.0]))) == 0.0
    # By hand: 8 (0.2 - 1)² (1.3 * 0.04 + 0.4 + 1) + 8 at the start.
    found = two_valleys(torch.tensor([0.2, 0.0], dtype=torch.float64))
    assert float(found) == pytest.approx(8 * 0.64 * 1.452 + 8, abs=1e-12)


def test_sophia_crosses_in_a_few_steps_and_newton_never():
    settings = Settings(toy_steps=60)
    assert steps_taken(SOPHIA, 1.0, settings) == 4
    assert steps_taken(NEWTON, 1.0, settings) == NEVER
    assert 20 < min(steps_taken("Adam", rate, settings) for rate in settings.toy_rates) < 60


def states(*, sophia: float = 2.0, half: float = 2.0, adam: float = 2.1) -> list[str]:
    """States of the checks for losses at the end."""
    arms = {
        arm: [Trained((1,), (loss,), ())]
        for arm, loss in (
            (ADAMW, adam),
            (f"{ADAMW}, half the steps", 2.2),
            (SOPHIA, sophia),
            (f"{SOPHIA}, half the steps", half),
        )
    }
    return [check.state for check in _checks({SOPHIA: 4, "Adam": 38}, arms)]


def test_checks_follow_the_rules_of_the_specification():
    assert states() == ["pass"] * 3
    assert states(half=2.11) == ["pass", "fail", "pass"]
    assert states(sophia=2.12) == ["pass"] * 3
    assert states(sophia=2.14) == ["pass", "pass", "fail"]
    assert states(sophia=math.inf, half=math.inf) == ["pass", "fail", "fail"]
    for loss in (2.0, math.inf):
        assert states(sophia=loss, half=loss, adam=math.inf) == ["pass", "fail", "fail"]


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("sophia", tmp_path)
    assert {ADAMW, SOPHIA} <= found.arms
    assert found.pictures == 2
    assert all(
        0 <= v <= 1 for (q, _), values in found.values.items() if "clipped" in q for v in values
    )
