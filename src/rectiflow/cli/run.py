"""`rectiflow run`: run a recipe, a paper's claim against measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import OutputOptions
from rectiflow.cli.settings import parse


@dataclass(frozen=True)
class Settings(OutputOptions):
    """Settings of `rectiflow run`."""

    recipe: tyro.conf.Positional[str] = tyro.MISSING
    """Slug of the recipe (rectiflow list)."""
    preset: str = "default"
    """quick takes seconds, default minutes on two cores, paper is the original setting; some
    recipes have others, such as fashion."""
    data: str | None = None
    """Data in place of the preset's, for recipes that take any: see rectiflow train."""


def main(words: Sequence[str]) -> int:
    """Run the command; the status is 1 when the claim fails."""
    settings = parse(Settings, words, command="run", summary=COMMANDS["run"].summary)
    from rectiflow.recipes.recipe import load_recipe, run_recipe

    recipe = load_recipe(settings.recipe)
    chosen = recipe.preset(settings.preset)
    if settings.data is not None:
        if not hasattr(chosen, "data"):
            raise ValueError(f"recipe {recipe.slug!r} makes its own data: leave out --data")
        chosen = replace(chosen, data=settings.data)
    with settings.open("run", settings.recipe) as run:
        result = run_recipe(recipe, chosen, run, preset=settings.preset)
        print(result.text())
        print(f"result: {run.path('result.json')}, report: {run.path('report.html')}")
    return 1 if result.verdict == "fails" else 0
