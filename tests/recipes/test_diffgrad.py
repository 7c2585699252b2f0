"""The functions of the paper by hand, the control, the rules and the quick preset."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes.classifier_lab import Trained
from rectiflow.recipes.diffgrad import (
    ADAM,
    ARMS,
    DIFFGRAD,
    FUNCTIONS,
    HALF,
    SIGNED,
    MeanFriction,
    Settings,
    _checks,
    descend,
)


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("F1", -0.3, 0.0),
        ("F1", 0.2, 0.05),
        ("F2", -1.0, 4.85),
        ("F2", 0.0, 0.85),
        ("F2", -0.643, -(0.643**3) + 0.643 * math.sin(8 * 0.643) + 0.85),
        ("F3", -0.6, 0.36),
        ("F3", 0.45, 0.3),
        ("F3", 0.4, 0.35),
    ],
)
def test_functions_have_the_values_of_the_paper(name, place, value):
    found = FUNCTIONS[name](torch.tensor(place, dtype=torch.float64))
    assert float(found) == pytest.approx(value, abs=1e-12)


# Measured with torch's own Adam and an independent diffGrad.
@pytest.mark.parametrize(
    "name, arm, end",
    [
        ("F1", ADAM, 0.2),
        ("F1", DIFFGRAD, -0.3),
        ("F1", HALF, -0.3003),
        ("F2", ADAM, 0.0001),
        ("F2", DIFFGRAD, -0.643),
        ("F2", HALF, -0.6431),
    ],
)
def test_descents_end_where_they_should(name, arm, end):
    assert descend(FUNCTIONS[name], arm, Settings())[-1] == pytest.approx(end, abs=1e-3)


def test_friction_is_that_of_the_optimizer():
    net = torch.nn.Linear(2, 1, bias=False)
    mean = MeanFriction(2)
    for step, grad in enumerate(([1.0, -3.0], [1.0, 1.0])):
        net.weight.grad = torch.tensor([grad])
        mean(step, net)
    first = (torch.sigmoid(torch.tensor([1.0, 3.0]))).mean()
    second = (torch.sigmoid(torch.tensor([0.0, 4.0]))).mean()
    assert mean.epochs == [pytest.approx(float(first + second) / 2)]


def states(adam: float, half: float) -> list[str]:
    """States of the checks where diffGrad has 80 and 81 per cent."""
    path = {arm: [-1.0, end] for arm, end in ((ADAM, 0.2), (HALF, -0.3), (DIFFGRAD, -0.3))}
    toys = {"F1": path, "F2": {ADAM: [0.0], HALF: [-0.643], DIFFGRAD: [-0.643]}}
    accuracy = {ADAM: adam, HALF: half, DIFFGRAD: 80.0, SIGNED: 80.0}
    arms = {
        arm: [Trained(value, (1.0,)), Trained(value + 1 + 0.1 * (arm != DIFFGRAD), (1.0,))]
        for arm, value in accuracy.items()
    }
    return [check.state for check in _checks(toys, arms)]


def test_checks_need_more_than_a_smaller_step():
    # The same ends as at half the rate: the second rule can only fail.
    assert states(79.0, 79.0) == ["pass", "fail", "pass", "pass"]
    assert states(80.0, 79.0)[2:] == ["fail", "pass"]
    assert states(79.0, 80.0)[2:] == ["pass", "fail"]


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("diffgrad", tmp_path)
    assert found.arms == set(ARMS)
    assert found.pictures == 2
    assert found.table["checks"][1]["state"] == "fail"
