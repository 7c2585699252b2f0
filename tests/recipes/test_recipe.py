from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rectiflow.recipes import recipe as module
from rectiflow.recipes.recipe import Check, Number, Recipe, Result, load_recipe, run_recipe
from rectiflow.training.runs import Run


def result(*checks: Check) -> Result:
    return Result("mine", "It helps.", [Number("error", "method", (1.0, 3.0))], checks, (0, 1))


@pytest.mark.parametrize(
    "values, broken, state",
    [
        ((4.0, 5.0), 2.0, "pass"),
        ((3.9, 5.0), 2.0, "weak"),  # one seed below the bound, the mean above the limit
        ((1.0, 2.9), 2.0, "fail"),  # mean 1.95
        ((1.0, 3.0), 2.0, "weak"),  # the limit itself is not yet broken
        ((3.9, 5.0), None, "weak"),
        ((3.0, 4.9), None, "fail"),
        ((math.nan, 9.0), 2.0, "fail"),
        ((math.inf, 9.0), 2.0, "pass"),
    ],
)
def test_lower_bound(values: tuple[float, ...], broken: float | None, state: str) -> None:
    assert Check("ratio", values, at_least=4.0, broken=broken).state == state


@pytest.mark.parametrize(
    "values, broken, state",
    [
        ((1.0, 0.5), 2.0, "pass"),
        ((1.1, 0.5), 2.0, "weak"),
        ((2.5, 1.6), 2.0, "fail"),
        ((1.1, 0.5), None, "weak"),
        ((1.1, 1.5), None, "fail"),
        ((math.nan, 0.0), 2.0, "fail"),
        ((math.inf, 0.0), 2.0, "fail"),
    ],
)
def test_upper_bound(values: tuple[float, ...], broken: float | None, state: str) -> None:
    assert Check("ratio", values, at_most=1.0, broken=broken).state == state


def test_a_bound_of_zero_is_a_bound() -> None:
    assert Check("gap", (0.0,), at_most=0.0).state == "pass"
    assert Check("gap", (-1.0,), at_least=0.0).state == "fail"
    assert Check("gap", (0.0,), at_least=0).rule == ">= 0"


def test_verdict_is_that_of_the_worst_check() -> None:
    good = Check("good", (2.0,), at_least=1)
    weak = Check("weak", (0.5, 2.0), at_least=1)
    bad = Check("bad", (0.5,), at_least=1)
    assert result(good, good).verdict == "holds"
    assert result(good, weak).verdict == "partly"
    assert result(good, weak, bad).verdict == "fails"


def test_without_a_check_nothing_holds() -> None:
    assert result().verdict == "partly"


def test_checks_need_one_bound_and_values() -> None:
    with pytest.raises(ValueError, match="either"):
        Check("none", (1.0,))
    with pytest.raises(ValueError, match="either"):
        Check("both", (1.0,), at_least=1, at_most=2)
    with pytest.raises(ValueError, match="no values"):
        Check("empty", (), at_least=1)


def test_number_is_summed_up() -> None:
    number = Number("error", "method", (1.0, 3.0))
    assert number.mean == 2.0
    assert number.spread == pytest.approx(math.sqrt(2))
    assert Number("error", "method", (1.0,)).spread == 0.0


@pytest.mark.parametrize("values", [(math.inf, 1.0), (math.nan, 1.0), (math.inf, -math.inf)])
def test_a_diverged_arm_is_reported(values: tuple[float, ...], tmp_path: Path) -> None:
    number = Number("error", "method", values)
    made = Result("mine", "It helps.", [number], [Check("error", values, at_most=1)], (0, 1))
    recipe = Recipe("mine", "rectified-flow", {"quick": {}}, lambda settings, run: made)
    with Run(tmp_path / "run", "run") as run:
        found = run_recipe(recipe, {}, run, preset="quick")
    assert found.verdict == "fails"
    assert math.isnan(number.spread)
    table = json.loads(run.path("result.json").read_text())
    assert table["numbers"][0]["spread"] is None
    assert "± nan" in found.text()


def test_text_says_numbers_states_and_verdict() -> None:
    text = result(Check("fall", (0.5,), at_least=1)).text()
    for part in ("It helps.", "error (method)", "2 ± 1.41", "fail  fall >= 1: 0.5"):
        assert part in text
    assert text.endswith("verdict: fails")


def test_unknown_slug_suggests_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean 'rectified-flow'"):
        load_recipe("rectified-flwo")


def test_planned_recipe_is_said_to_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from rectiflow.recipes.catalog import SYSTEMS

    planned = replace(SYSTEMS[0], recipes=("of-tomorrow",))
    monkeypatch.setattr(module, "SYSTEMS", (planned,))
    with pytest.raises(ValueError, match=r"'of-tomorrow' is planned, not built"):
        load_recipe("of-tomorrow")


@pytest.mark.parametrize("slug", ["rectified-flow", "domain-transfer"])
def test_recipes_offer_the_three_presets(slug: str) -> None:
    recipe = load_recipe(slug)
    assert recipe.system == "rectified-flow"
    assert set(recipe.presets) >= set(module.PRESETS)
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        recipe.preset("quik")


def test_run_recipe_writes_the_evidence(tmp_path: Path) -> None:
    made = result(Check("fall", (0.5, 2.0), at_least=1), Check("gap", (math.nan,), at_most=1))
    recipe = Recipe("mine", "rectified-flow", {"quick": {"steps": 1}}, lambda settings, run: made)
    with Run(tmp_path / "run", "run") as run:
        found = run_recipe(recipe, recipe.preset("quick"), run, preset="quick")
    assert found is made
    table = json.loads(run.path("result.json").read_text())
    assert table["verdict"] == "fails"
    assert [check["state"] for check in table["checks"]] == ["weak", "fail"]
    assert [check["broken"] for check in table["checks"]] == [1, 1]
    assert table["numbers"][0]["values"] == [1.0, 3.0]
    assert (table["preset"], table["settings"]) == ("quick", {"steps": 1})
    assert json.loads(run.path("run.json").read_text())["systems"] == ["rectified-flow"]
    page = run.path("report.html").read_text()
    assert "mine: the claim fails" in page
    assert "&gt; 1" in page or "> 1" in page
