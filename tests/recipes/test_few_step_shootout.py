"""The shootout: every method of the table takes part, and the page compares them all."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from rectiflow.distill.few_step_method import Choices
from rectiflow.distill.methods import METHODS
from rectiflow.flows.couplings import Independent
from rectiflow.recipes.few_step_shootout import ARMS, _method
from rectiflow.recipes.recipe import load_recipe, run_recipe
from rectiflow.recipes.tools import new_model
from rectiflow.training.runs import Run


def test_every_method_takes_part() -> None:
    assert {part.method for stages in ARMS.values() for part in stages} == {
        # The teacher of the recipe takes no condition.
        name
        for name, entry in METHODS.items()
        if not entry.conditional
    }


def test_the_discriminator_depends_on_the_seed_alone() -> None:
    teacher = new_model("mlp", (2,), seed=0, width=8, depth=1)
    data = Independent(torch.zeros(8, 2))
    entry = METHODS["f-distill"]

    def first_weights(seed: int) -> torch.Tensor:
        torch.rand(1)
        method: Any = _method(entry, teacher, data, Choices(steps=1, options=entry.options()), seed)
        return torch.cat([p.flatten() for p in method.judge.discriminator.parameters()])

    assert torch.equal(first_weights(3), first_weights(3))
    assert not torch.equal(first_weights(3), first_weights(4))


def test_quick_preset_gives_numbers_and_the_page(tmp_path) -> None:
    recipe = load_recipe("few-step-shootout")
    arms = ("two phases", "one-step", "reflow, then one-step", "reflow")
    settings = replace(recipe.preset("quick"), arms=arms)
    with Run(tmp_path / "run", "run", settings) as run:
        result = run_recipe(recipe, settings, run, preset="quick")
        assert len(result.checks) == len(arms)
        steps = {n.arm.partition(", ")[0]: n.arm for n in result.numbers}
        assert steps["two phases"].endswith("2 steps")
        # A straightened flow has no number of its own.
        assert "reflow, 1 step" in {n.arm for n in result.numbers}
        assert all(v > 0 for n in result.numbers for v in n.values)
        page = json.loads(run.path("compare.json").read_text())
    titles = [model["title"] for model in page["models"]]
    assert titles == ["teacher", *arms]
    by_title = {model["title"]: model for model in page["models"]}
    halves = [entry["steps"] for entry in by_title["reflow, then one-step"]["lineage"]]
    assert halves == [settings.teacher.steps, *[settings.budget.steps // 2] * 2]
    assert {m["lineage"][-1]["steps"] for m in by_title.values()} <= {
        settings.teacher.steps,
        settings.budget.steps,
        settings.budget.steps // 2,
    }
    with Run(tmp_path / "run", "run", settings, resume=True) as run:
        again = run_recipe(recipe, settings, run, preset="quick")
    assert [n.values for n in again.numbers] == [n.values for n in result.numbers]
