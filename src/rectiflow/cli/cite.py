"""`rectiflow cite`: the papers that a run or model used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.settings import parse


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow cite`."""

    run: tyro.conf.Positional[Path]
    """Run folder or model folder."""


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="cite", summary=COMMANDS["cite"].summary)
    from rectiflow.recipes.catalog import bibtex, find

    slugs = systems_of(settings.run)
    if not slugs:
        print("the run used no published system")
    for slug in slugs:
        print(bibtex(find(slug)))
    return 0


def systems_of(folder: Path) -> list[str]:
    """Slugs of the systems that a run's record or a model's lineage names."""
    from rectiflow.files import read_json

    for name in ("run.json", "config.json"):
        if (folder / name).is_file():
            table = read_json(folder / name)
            lineage = [
                slug for entry in table.get("lineage", []) for slug in entry.get("systems", [])
            ]
            return sorted({*table.get("systems", []), *lineage})
    raise FileNotFoundError(
        f"{folder} is neither a run nor a model folder (no run.json, config.json)"
    )
