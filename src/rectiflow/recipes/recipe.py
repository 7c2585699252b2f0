"""Recipes: a paper's claim, an experiment, and a verdict computed from its numbers."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rectiflow.errors import unknown
from rectiflow.files import write_json
from rectiflow.recipes.catalog import SYSTEMS, recipe_exists, recipe_module
from rectiflow.training.report import Section, Table, cell, write_report
from rectiflow.training.runs import Run, plain

PRESETS = ("quick", "default", "paper")


@dataclass(frozen=True)
class Number:
    """A quantity of one arm over seeds.

    Attributes:
        quantity: what was measured, with its unit.
        arm: the method or baseline it belongs to.
        values: one value a seed.
    """

    quantity: str
    arm: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN where infinities of both signs meet."""
        return _mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed, NaN unless all values are finite."""
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Check:
    """A part of the claim, as a bound on a number.

    It passes if every seed keeps the bound, fails if the mean is beyond `broken`, and is weak in
    between.

    Attributes:
        name: what is bounded.
        values: one value a seed.
        at_least: lower bound, or None.
        at_most: upper bound, or None.
        broken: the value beyond which (below a lower bound, above an upper one) the claim fails;
            the bound itself by default.
    """

    name: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None
    broken: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"check {self.name!r} needs either at_least or at_most")
        if not self.values:
            raise ValueError(f"check {self.name!r} has no values")

    @property
    def state(self) -> str:
        """pass, weak or fail."""
        lower = self.at_least is not None
        bound = self.at_least if self.at_least is not None else self.at_most
        assert bound is not None
        # A NaN compares false and so can never pass.
        if all(value >= bound if lower else value <= bound for value in self.values):
            return "pass"
        mean = _mean(self.values)
        kept = mean >= self.limit if lower else mean <= self.limit
        return "weak" if kept else "fail"

    @property
    def limit(self) -> float:
        """What the mean may not be beyond: `broken`, or the bound."""
        bound = self.at_least if self.at_least is not None else self.at_most
        assert bound is not None
        return bound if self.broken is None else self.broken

    @property
    def rule(self) -> str:
        """The bound in words."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    @property
    def refuted(self) -> str:
        """What the mean fails at, in words."""
        return f"{'<' if self.at_least is not None else '>'} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """What a recipe found.

    Attributes:
        slug: the recipe.
        claim: the paper's claim in one line of ours.
        numbers: every measured quantity, method and baseline.
        checks: the claim as bounds.
        seeds: the seeds used.
        notes: what a reader should know.
        pictures: file to caption.
    """

    slug: str
    claim: str
    numbers: Sequence[Number]
    checks: Sequence[Check]
    seeds: Sequence[int]
    notes: Sequence[str] = ()
    pictures: Mapping[Path, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """holds if every check passes, fails if one fails, partly otherwise."""
        states = {check.state for check in self.checks}
        if states == {"pass"}:
            return "holds"
        return "fails" if "fail" in states else "partly"

    def text(self) -> str:
        """The result for a terminal."""
        lines = [f"claim: {self.claim}", ""]
        width = max(len(f"{n.quantity} ({n.arm})") for n in self.numbers)
        for n in self.numbers:
            lines.append(
                f"  {f'{n.quantity} ({n.arm})':<{width}}  {cell(n.mean)} ± {cell(n.spread)}"
            )
        lines.append("")
        for check in self.checks:
            values = ", ".join(cell(v) for v in check.values)
            lines.append(f"  {check.state:<4}  {check.name} {check.rule}: {values}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, "", f"verdict: {self.verdict}"])


@dataclass(frozen=True)
class Recipe:
    """An experiment that can be run by name.

    Attributes:
        slug: its name.
        system: slug of the system it measures.
        presets: settings by preset.
        run: the experiment.
    """

    slug: str
    system: str
    presets: Mapping[str, Any]
    run: Callable[[Any, Run], Result]

    def preset(self, name: str) -> Any:
        """The settings of a preset."""
        if name not in self.presets:
            raise unknown("preset", name, self.presets)
        return self.presets[name]


def load_recipe(slug: str) -> Recipe:
    """The recipe of a slug.

    Raises:
        ValueError: no such recipe, or one whose system is not built yet.
    """
    owners = {name: system for system in SYSTEMS for name in system.recipes}
    if slug not in owners:
        raise unknown("recipe", slug, owners)
    if not recipe_exists(slug):
        raise ValueError(f"recipe {slug!r} is planned, not built (rectiflow list shows which are)")
    found = importlib.import_module(recipe_module(slug))
    return Recipe(slug, owners[slug].slug, found.PRESETS, found.run)


def run_recipe(recipe: Recipe, settings: Any, run: Run, *, preset: str) -> Result:
    """Run a recipe in a run folder and write `result.json` and `report.html` there."""
    run.used(recipe.system)
    result = recipe.run(settings, run)
    write_json(run.path("result.json"), as_table(result, settings, run, preset))
    write_report(
        run.path("report.html"),
        f"{recipe.slug}: the claim {result.verdict}"
        if result.verdict != "partly"
        else f"{recipe.slug}: the claim holds in part",
        [
            Section(
                "Checks",
                tables=[
                    Table(
                        ["check", "rule", "fails if the mean is", "by seed", "state"],
                        [
                            [c.name, c.rule, c.refuted, ", ".join(map(cell, c.values)), c.state]
                            for c in result.checks
                        ],
                    )
                ],
                texts=list(result.notes),
            ),
            Section(
                "Numbers",
                tables=[
                    Table(
                        ["quantity", "arm", "mean", "standard deviation", "by seed"],
                        [
                            [n.quantity, n.arm, n.mean, n.spread, ", ".join(map(cell, n.values))]
                            for n in result.numbers
                        ],
                        caption=f"Seeds {', '.join(map(str, result.seeds))}.",
                    )
                ],
                pictures=dict(result.pictures),
            ),
            Section(
                "Settings",
                facts={"settings": plain(settings), "environment": run.record["environment"]},
            ),
        ],
        lead=[result.claim],
    )
    return result


def as_table(result: Result, settings: Any, run: Run, preset: str) -> dict[str, Any]:
    """A result as plain values, the form in which evidence is committed."""
    return {
        "slug": result.slug,
        "preset": preset,
        "claim": result.claim,
        "verdict": result.verdict,
        "seeds": list(result.seeds),
        "numbers": [
            {
                "quantity": n.quantity,
                "arm": n.arm,
                "mean": _finite(n.mean),
                "spread": _finite(n.spread),
                "values": [_finite(value) for value in n.values],
            }
            for n in result.numbers
        ],
        "checks": [
            {
                "name": c.name,
                "rule": c.rule,
                "broken": _finite(c.limit),
                "values": [_finite(value) for value in c.values],
                "state": c.state,
            }
            for c in result.checks
        ],
        "notes": list(result.notes),
        "settings": plain(settings),
        "device": run.record["environment"]["device"],
        "environment": run.record["environment"],
    }


def _mean(values: Sequence[float]) -> float:
    # A sum that is exact refuses infinities of both signs.
    finite = all(map(math.isfinite, values))
    return statistics.fmean(values) if finite else sum(values) / len(values)


def _finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
