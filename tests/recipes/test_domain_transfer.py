from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes.domain_transfer import (
    FEATURES,
    PLAIN,
    PRESETS,
    RANDOM,
    UNCHANGED,
    _shuffled_cost,
)
from rectiflow.recipes.recipe import load_recipe
from rectiflow.training.runs import Run


def test_random_pairing_is_the_mean_over_all_other_partners() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 1, 2, 2, generator=generator) for _ in range(2))
    slow = [(a[i] - b[j]).square().sum().item() for i in range(6) for j in range(6) if i != j]
    assert _shuffled_cost(a, b) == pytest.approx(sum(slow) / len(slow), rel=1e-6)


def test_presets_carry_one_to_seven() -> None:
    assert (PRESETS["default"].source, PRESETS["default"].target) == ("1", "7")
    assert len(PRESETS["default"].seeds) == 3
    assert PRESETS["paper"].size == 512


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    run = run_quick("domain-transfer", tmp_path)
    found = run.values
    # What the judge says of real images shows that it can judge.
    assert found["share judged '7'", RANDOM][0] > 0.8
    assert found["share still judged '1'", UNCHANGED][0] > 0.8
    assert found["squared pixel distance to the source", UNCHANGED] == [0.0]
    assert {("share judged '7'", FEATURES), ("share judged '7'", PLAIN)} <= set(found)
    edits = [v for (q, a), v in found.items() if q.startswith("edit: squared") and "shrunk, 1" in a]
    # All of the latent kept: what is left is the error of the round trip.
    assert edits[0][0] < 0.5
    assert run.pictures == 2


def test_unknown_class_is_named(tmp_path: Path) -> None:
    recipe = load_recipe("domain-transfer")
    settings = replace(PRESETS["quick"], target="seven")
    with Run(tmp_path / "run", "run") as run, pytest.raises(ValueError, match="unknown class"):
        recipe.run(settings, run)
