"""The recipe of adaptive projected guidance: its rules, its judges, its quick run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes import apg
from rectiflow.recipes.apg import ARMS, CFG, FULL, Judges, Score, Settings, checks
from rectiflow.training.data import load


def states(*fulls: Score) -> list[str]:
    """States at one large scale, one record of APG a seed."""
    settings, cfg = Settings(scales=(3.0, 6.0)), Score(10.0, 0.4, 1.0, 0.98)
    near = {3.0: cfg}
    found = [{arm: {**near, 6.0: full if arm == FULL else cfg} for arm in ARMS} for full in fulls]
    return [check.state for check in checks(found, settings)]


def test_checks_follow_the_rules_of_the_specification() -> None:
    good = Score(4.0, 0.2, 1.0, 0.98)
    assert states(good) == ["pass"] * 3, "the small scale is not part of the claim"
    assert states(good, Score(6.0, 0.2, 1.0, 0.98))[0] == "weak"
    assert states(Score(8.1, 0.2, 1.0, 0.98))[0] == "fail"
    assert states(Score(4.0, 0.35, 1.0, 0.98))[1] == "weak"
    assert states(Score(4.0, 0.5, 1.0, 0.98))[1] == "fail"
    assert states(Score(4.0, 0.2, 1.0, 0.975))[2] == "weak"
    assert states(Score(4.0, 0.2, 1.0, 0.9))[2] == "fail"
    assert states(Score(math.nan, 0.2, 1.0, 0.98))[0] == "fail"


def test_default_follows_the_specification() -> None:
    default = Settings()
    assert default.scales == (1.0, 3.0, 6.0, 10.0)
    assert (default.training.steps, default.training.batch_size) == (4000, 256)
    assert (default.condition_dropout, default.steps, default.samples) == (0.15, 30, 1000)
    assert (default.norm, default.momentum, default.white) == (2.0, -0.5, 1.1)
    assert default.seeds == (0, 1, 2)


def test_judges_know_data_from_noise() -> None:
    train, test = (load("digits", split=s) for s in ("train", "test"))
    judges, rows = Judges([train, test], 1.1), torch.arange(len(test))
    images, label = test.batch(rows), test.condition(rows)["label"]
    real = judges.score(images, label)
    assert real.saturated == 0
    assert real.accuracy > 0.95
    burnt = judges.score(3 * images, label)
    assert burnt.saturated > 0.5
    assert burnt.distance > 10 * real.distance


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("apg", tmp_path)
    assert found.arms == {*ARMS, "no guidance", "data"}
    assert set(apg.PRESETS) == {"quick", "default", "paper"}
    for name in ("distance.png", "saturation.png", "samples.png"):
        assert found.run.path(name).stat().st_size > 1000
    of = {arm: v for (quantity, arm), v in found.values.items() if quantity.startswith("Fréchet")}
    assert of[CFG] != of[FULL]
