from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.flows.diffusion_paths import CosinePath
from rectiflow.flows.metrics import FirstOrderGap
from rectiflow.recipes import rectified_diffusion
from rectiflow.recipes.first_order_theory import chord_distance, exact_rectification
from rectiflow.recipes.rectification_scores import (
    ARMS,
    BEFORE,
    CONVERTED,
    RECTIFIED,
    TURNED,
    Scores,
    crossing,
)
from rectiflow.recipes.rectified_diffusion import Settings, _checks

GAP = FirstOrderGap(1.0, torch.ones(2), [0.0, 0.5], 1.0)


def scores(
    own: dict[int, tuple[float, float]],
    after: float = 0.05,
    turned: dict[int, tuple[float, float]] | None = None,
) -> Scores:
    """Errors of the specification's pilot: conversion as measured, rectification as given."""
    other = {50: (1.72, 1.0), 200: (0.639, 0.576), 1000: (0.319, 0.3), 3000: (0.123, 0.134)}
    return Scores(
        before=(0.327, 0.082),
        along={RECTIFIED: own, CONVERTED: other, TURNED: turned or other},
        phased={2: (0.1, after), 4: (0.1, after)},
        consistency=(0.1, 0.1),
        gaps={BEFORE: GAP},
        images={},
    )


PILOT = {50: (0.324, 0.08), 200: (0.307, 0.064), 1000: (0.284, 0.06), 3000: (0.199, 0.041)}


def states(found: Scores) -> list[str]:
    return [check.state for check in _checks(Settings(), [found], exact_rectification(count=20))]


def test_checks_follow_the_rules_of_the_specification() -> None:
    names = [c.name for c in _checks(Settings(), [scores(PILOT)], exact_rectification(count=20))]
    assert sum(name.startswith("one-step MSE, rectified / converted,") for name in names) == 2
    assert sum(name.startswith("two-step MSE, rectified / converted,") for name in names) == 4
    assert set(states(scores(PILOT))) == {"pass"}
    # Worse than 0.6 of the conversion in one step after 200 steps; 0.5 in two after 1000.
    behind = states(scores({**PILOT, 200: (0.5, 0.064)}))
    assert (behind.count("fail"), behind.count("weak")) == (1, 0)
    assert states(scores({**PILOT, 1000: (0.284, 0.2)})).count("fail") == 1
    # A conversion that is not set back by a sign counts where it is the better one.
    better = {**scores(PILOT).along[CONVERTED], 200: (0.4, 0.1)}
    assert states(scores(PILOT, turned=better)).count("fail") == 2
    # Behind the conversion in one step after 1000 steps: an honest limit, not a rule.
    assert set(states(scores({**PILOT, 1000: (0.5, 0.06)}))) == {"pass"}
    # The last two rules weaken the claim and cannot break it.
    assert states(scores({**PILOT, 3000: (0.3, 0.041)})).count("weak") == 1
    assert states(scores(PILOT, after=0.08)).count("weak") == 2


def test_crossing_is_read_from_both_curves() -> None:
    found = crossing(scores(PILOT))
    assert 1000 < found < 3000
    # Equal logarithms on both sides of the geometric mean put the crossing there.
    halves = scores({100: (0.5, 1.0), 400: (2.0, 1.0)})
    other = {100: (1.0, 1.0), 400: (1.0, 1.0)}
    halves = replace(halves, along={**halves.along, CONVERTED: other, TURNED: other})
    assert crossing(halves) == pytest.approx(200)
    never = replace(halves, along={**halves.along, RECTIFIED: {100: (0.5, 1.0)}})
    assert crossing(never) == math.inf
    at_once = replace(halves, along={**halves.along, RECTIFIED: {100: (1.5, 1.0)}})
    assert crossing(at_once) == 100


def test_exact_example_shows_the_theorem() -> None:
    found = exact_rectification()
    # Rounding of float64.
    assert found.gap < 1e-20
    assert found.difference < 1e-12
    assert found.curvature > 0.05
    bent, straight = (chord_distance(states) for states in found.panels.values())
    assert bent > 0.05
    assert straight < 1e-12


def test_default_follows_the_specification() -> None:
    settings = rectified_diffusion.PRESETS["default"]
    assert (settings.flow.steps, settings.pairs.count, settings.pairs.steps) == (2000, 6000, 50)
    assert settings.lengths == (50, 200, 1000, 3000)
    assert set(settings.lengths) <= set(settings.looks)
    assert settings.tuning.steps == settings.looks[-1]
    assert (settings.phases, settings.phased.steps) == ((2, 4), 1500)
    assert all(settings.teacher_steps % m == 0 for m in settings.phases)
    assert settings.seeds == (0, 1, 2)


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("rectified-diffusion", tmp_path)
    arms = {*ARMS, BEFORE, f"{RECTIFIED}, then consistency", "rectified in 4 phases"}
    assert arms <= found.arms
    assert found.pictures == 5
    assert found.run.record["systems"] == ["rectified-diffusion", "rectified-flow"]
    store = json.loads((found.run.path("seed-0") / "pairs" / "store.json").read_text())
    assert store["settings"]["solver"] == {"name": "first-order"}
    assert store["settings"]["path"] == CosinePath().config()
