from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.nets import build, build_spec
from rectiflow.recipes.slimflow import PRESETS, _checks
from rectiflow.recipes.small_students import (
    ANNEALED,
    DISTILLED,
    FLOW,
    MIRRORED,
    PAIRED,
    PLAIN_PAIRS,
    STUDENT_FIRST,
    TEACHER_FIRST,
    Annealed,
    Found,
    OneStep,
)


def found(annealed: float, mirrored: float, guided: tuple[float, float], plain: float) -> Found:
    """A seed whose baselines are 1."""
    blank = torch.zeros(1)
    first, error = guided
    return Found(
        {1000: {PAIRED: Annealed(1.0, 1.0), ANNEALED: Annealed(annealed, 1.0)}},
        {PLAIN_PAIRS: 1.0, MIRRORED: mirrored},
        {
            FLOW: OneStep(2.0, 2.0, blank),
            DISTILLED: OneStep(plain, 1.0, blank),
            TEACHER_FIRST: OneStep(1.0, 1.0, blank),
            STUDENT_FIRST: OneStep(first, error, blank),
        },
        1.0,
    )


def test_checks_are_the_specifications_rules() -> None:
    good = found(0.95, 0.85, (0.9, 0.8), 0.95)
    assert [c.state for c in _checks([good] * 2, PRESETS["default"], "fd")] == ["pass"] * 5
    # Annealing and the comparison with plain distillation are judged by means over seeds ...
    worse = found(0.99, 0.85, (0.94, 0.8), 0.95)
    assert [c.state for c in _checks([good, worse], PRESETS["default"], "fd")] == ["pass"] * 5
    # ... the rest seed by seed.
    bad = found(1.01, 1.2, (1.2, 1.3), 1.0)
    states = [c.state for c in _checks([bad, bad], PRESETS["default"], "fd")]
    assert states == ["fail"] * 5
    same = [
        c.state for c in _checks([found(1.0, 0.85, (1.0, 1.0), 1.05)], PRESETS["default"], "fd")
    ]
    assert same == ["fail", "pass", "fail", "fail", "pass"]
    mixed = [c.state for c in _checks([good, bad], PRESETS["default"], "fd")]
    assert mixed == ["weak", "fail", "fail", "fail", "fail"]


def test_presets_are_those_of_the_specification() -> None:
    settings = PRESETS["default"]
    assert len(settings.seeds) >= 5
    assert (settings.pairs[0], settings.distil_pairs, settings.mirrored_pairs) == (1000, 500, 500)
    assert (settings.anneal.steps, settings.distil.steps, settings.ramp) == (1500, 600, 0.375)
    shape = (1, 8, 8)
    nets = [
        build(settings.net, shape=shape, **settings.net_options),
        build_spec(settings.student, shape=shape),
        build_spec(settings.guided_student, shape=shape),
    ]
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [54_752, 12_000, 17_936]
    paper = PRESETS["paper"]
    assert (paper.anneal.steps * paper.ramp, paper.distil.steps) == (300_000, 400_000)


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    run = run_quick("slimflow", tmp_path)
    assert {PAIRED, ANNEALED, PLAIN_PAIRS, MIRRORED, FLOW, STUDENT_FIRST, TEACHER_FIRST} <= run.arms
    assert len(run.table["checks"]) == 5
    # The first flow of the distillation is where its students start.
    moved = [v[0] for (q, _), v in run.values.items() if q.startswith("distilled: squared")]
    assert len(set(moved)) == 4
    assert run.pictures == 2


def test_mean_of_two_seeds_decides_the_annealing_check() -> None:
    seeds = [found(0.9, 0.8, (0.9, 0.9), 1.0), found(1.02, 0.8, (0.9, 0.9), 1.0)]
    check = _checks(seeds, PRESETS["default"], "fd")[0]
    assert check.values == pytest.approx((0.04,))
