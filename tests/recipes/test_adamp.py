"""The scale-invariant vector against theory, the rules and the quick preset."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.recipes.quick import run_quick

from rectiflow.recipes.adamp import (
    ADAMP,
    ADAMW,
    ARMS,
    GD,
    NESTEROV,
    PROJECTED,
    SGD,
    Grown,
    Settings,
    Turned,
    _checks,
    turn,
)
from rectiflow.recipes.classifier_lab import Trained


def test_momentum_lengthens_a_vector_that_sgdp_keeps_short():
    growth = {arm: turn(arm, Settings(), 0).squares[-1] - 1 for arm in (GD, SGD, PROJECTED)}
    # Theory: 1 + 2 beta / (1 - beta) = 19 for steps of equal length; the directions differ.
    assert growth[GD] < growth[PROJECTED]
    assert 10 < growth[SGD] / growth[PROJECTED] < 40
    # eps, added to norms, leaves a little of the radial part.
    assert turn(PROJECTED, Settings(), 0).miss < 1e-7
    assert turn(SGD, Settings(), 0).miss > 1e-3


def states(*, growth: float = 1.2, flagged: float = 1.0, head: float = 0.0, lost: float = 0.0):
    """States of the checks where SGD's kernels double and every accuracy is 80 but SGDP's."""
    turned = {
        GD: [Turned((1.0, 1.1), 0.0)],
        SGD: [Turned((1.0, 9.0), 0.1)],
        PROJECTED: [Turned((1.0, 1.5), 0.0)],
        NESTEROV: [Turned((1.0, 1.5), 0.0)],
    }
    grown = {
        SGD: [Grown((2.0, 2.0), (1.0, 1.0), 0.0)],
        PROJECTED: [Grown((1.0, growth), (1.0, flagged), head)],
    }
    accuracy = {SGD: 80.0, PROJECTED: 80.0 - lost, ADAMW: 80.0, ADAMP: 80.0}
    tuned = {arm: [Trained(value, (1.0,))] for arm, value in accuracy.items()}
    return [check.state for check in _checks(turned, grown, tuned)]


@pytest.mark.parametrize(
    "change, place",
    [({"growth": 1.5}, 2), ({"flagged": 0.9}, 3), ({"head": 0.01}, 4), ({"lost": 1.5}, 5)],
)
def test_checks_follow_the_rules_of_the_specification(change, place):
    assert states() == ["pass"] * 7
    assert [k for k, state in enumerate(states(**change)) if state == "fail"] == [place]


def test_one_seed_is_enough_to_refute_the_growth():
    turned = {arm: [Turned((1.0, 2.0), 0.0)] * 3 for arm in (GD, SGD, PROJECTED, NESTEROV)}
    tuned = {arm: [Trained(80.0, (1.0,))] * 3 for arm in ARMS}
    grown = {
        arm: [Grown((1.0, growth), (1.0, 1.0), 0.0) for growth in growths]
        for arm, growths in ((SGD, (3.0, 3.0, 3.0)), (PROJECTED, (0.1, 0.1, 2.2)))
    }
    grown[SGD] = [Grown((9.0, 3.0), (1.0, 1.0), 0.0)] * 3
    assert _checks(turned, grown, tuned)[2].state == "fail"


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("adamp", tmp_path)
    assert set(ARMS) <= found.arms
    assert found.pictures == 2
    # What does not depend on the size of the experiment.
    assert [found.table["checks"][k]["state"] for k in (0, 1)] == ["pass", "pass"]
