"""The recipe of visual anagrams: its rules, its shapes and judges, its quick run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rectiflow.recipes.anagram_shapes import (
    SHAPES,
    SIZES,
    Drawn,
    ShapeJudge,
    ShapeSettings,
    draw_shapes,
    embed,
)
from rectiflow.recipes.noisy_classifier import fit_noisy
from rectiflow.recipes.recipe import load_recipe, run_recipe
from rectiflow.recipes.tools import new_model
from rectiflow.recipes.visual_anagram import (
    BALANCED,
    MATCHED,
    MEAN,
    OFFICIAL,
    PLAIN,
    PRESETS,
    STEERED,
    Found,
    Score,
    Settings,
    checks,
)
from rectiflow.training.data import load
from rectiflow.training.runs import Run


def seed(gain: float = 0.05, gap: float = 0.13, away: float = 0.05, lost: float = 0.0) -> Found:
    digits = {("ODE", MEAN): Score(0.8, 0.2, 0.7), ("ODE", BALANCED): Score(0.8 + gain, gap, 0.7)}
    images = torch.zeros(1)
    shapes = {
        PLAIN: Drawn(0.35, 0.1, 0.5, images),
        STEERED: Drawn(0.4, away, 0.5 - lost, images),
    }
    return Found({3.0: digits}, shapes, {}, 1.0)


def states(*found: Found) -> list[str]:
    return [check.state for check in checks(found, Settings())]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert states(seed()) == ["pass"] * 4
    assert states(seed(gain=0.02))[0] == "weak"
    assert states(seed(gain=-0.01))[0] == "fail"
    assert states(seed(gap=0.17))[1] == "weak"
    assert states(seed(gap=0.21))[1] == "fail"
    assert states(seed(), seed(gap=0.17))[1] == "weak", "every seed must keep the bound"
    assert states(seed(away=0.1))[2] == "weak"
    assert states(seed(away=0.11))[2] == "fail"
    assert states(seed(lost=0.04))[3] == "fail"
    assert states(seed(gain=math.nan))[0] == "fail"


def test_default_follows_the_specification() -> None:
    default = Settings()
    assert (default.classifier_steps, default.steps, default.samples) == (1200, 40, 100)
    assert (default.scales, default.seeds) == ((1.0, 3.0), (0, 1, 2))
    assert default.shapes.step_size == ShapeSettings().step_size
    assert set(PRESETS) == {"quick", "default", "paper"}


def test_shapes_are_whole_and_judges_know_them() -> None:
    generator = torch.Generator().manual_seed(0)
    images, words = draw_shapes(1500, generator=generator)
    assert images.min() == -1
    assert images.max() == 1
    # Nothing is cut off: the border belongs to the ground nearly everywhere.
    assert (images[:, :, 0] > 0).float().mean() < 0.1
    assert set(words[:, 0].tolist()) == set(range(len(SIZES)))
    assert set(words[:, 1].tolist()) == set(range(len(SIZES), len(SIZES) + len(SHAPES)))
    light = (images > 0).float().flatten(1).sum(1)
    assert light[words[:, 0] == 1].mean() > 1.5 * light[words[:, 0] == 0].mean()
    assert torch.equal(embed(words).argmax(2), words)
    shape = words[:, 1] - len(SIZES)
    judge = ShapeJudge(images[:1000], shape[:1000])
    assert judge.accuracy(images[1000:], shape[1000:]) > 0.9
    assert judge.chance(images[1000:], shape[1000:]).mean() > 0.8


def test_the_classifier_of_noisy_states_knows_time() -> None:
    data = load("digits")
    net = fit_noisy(data, new_model("mlp", data.shape, seed=0, width=8, depth=1), 200, 0)
    rows = torch.arange(500)
    images, label = data.batch(rows), data.condition(rows)["label"]
    clean = net(images, torch.ones(500)).argmax(1) == label
    assert clean.float().mean() > 0.7
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    chance = net(noise, torch.zeros(500)).softmax(1)
    # Of pure noise it says that anything is possible.
    assert chance.amax(1).mean() < 0.5


def test_quick_run_writes_a_result(tmp_path: Path) -> None:
    recipe = load_recipe("visual-anagram")
    with Run(tmp_path / "run", "run", {}) as run:
        result = run_recipe(recipe, recipe.preset("quick"), run, preset="quick")
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert record["verdict"] == result.verdict
    assert all(math.isfinite(v) for n in result.numbers for v in n.values)
    assert len(result.checks) == 4
    for name in ("digits.png", "shapes.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    spread = {n.arm: n.mean for n in result.numbers if n.quantity.startswith("standard deviation")}
    for solver in ("ODE", "ancestral"):
        plain, official, matched = (spread[f"{arm}, {solver}"] for arm in (MEAN, OFFICIAL, MATCHED))
        assert official != plain != matched
    assert spread["data"] == pytest.approx(0.752, abs=0.01)
