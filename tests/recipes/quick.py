"""One run of a recipe's quick preset, with what holds for every recipe."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rectiflow.recipes.recipe import load_recipe, run_recipe
from rectiflow.training.runs import Run


@dataclass(frozen=True)
class Quick:
    """What a run left behind.

    Attributes:
        run: the run.
        table: result.json.
        page: report.html.
    """

    run: Run
    table: dict[str, Any]
    page: str

    @property
    def arms(self) -> set[str]:
        """What was compared."""
        return {number["arm"] for number in self.table["numbers"]}

    @property
    def values(self) -> dict[tuple[str, str], list[float]]:
        """Values over the seeds by quantity and arm."""
        return {(n["quantity"], n["arm"]): n["values"] for n in self.table["numbers"]}

    @property
    def pictures(self) -> int:
        """How many pictures the page shows."""
        return self.page.count("data:image/png;base64,")


def run_quick(slug: str, folder: Path) -> Quick:
    """Run the quick preset: verdict kept, numbers finite, a page that needs no other file."""
    recipe = load_recipe(slug)
    assert recipe.slug == slug
    settings = recipe.preset("quick")
    with Run(folder / "run", "run", settings) as run:
        result = run_recipe(recipe, settings, run, preset="quick")
    table = json.loads(run.path("result.json").read_text())
    assert table["verdict"] == result.verdict
    assert all(math.isfinite(v) for number in table["numbers"] for v in number["values"])
    page = run.path("report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    return Quick(run, table, page)
