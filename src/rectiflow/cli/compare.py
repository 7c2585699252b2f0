"""`rectiflow compare`: models side by side on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.judging import JudgeOptions
from rectiflow.cli.options import plain_warnings
from rectiflow.cli.settings import parse
from rectiflow.errors import BeyondDistilledStepsWarning

if TYPE_CHECKING:
    from rectiflow.cli.models import Opened
    from rectiflow.flows.fields import FlowModel


@dataclass(frozen=True)
class Settings(JudgeOptions):
    """Settings of `rectiflow compare`."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Model folders, run folders (of several stages too) and diffusers pipelines, here or on the
    Hub."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    """Numbers of Euler steps."""
    out: Path | None = None
    """Folder for report.html, compare.json and pictures; runs/compare-TIME by default."""
    overwrite: bool = False
    """Write over what is in --out."""

    def __post_init__(self) -> None:
        self.check_scores(self.steps)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="compare", summary=COMMANDS["compare"].summary)
    # Every model is scored at every number of steps, on purpose.
    with plain_warnings(BeyondDistilledStepsWarning):
        _compare(settings)
    return 0


def _compare(settings: Settings) -> None:
    """Open the models, score them, write the page."""
    from rectiflow.distill.comparison_page import compare, write
    from rectiflow.training.comparison import check_comparable, read_models
    from rectiflow.training.runs import Run, new_folder

    opened: dict[str, Opened] = {}

    def read(source: str) -> FlowModel:
        opened[source] = settings.open(source)
        return opened[source].model

    entries = read_models(settings.runs, read)
    check_comparable(entries, data=settings.data)
    evaluator = settings.evaluator([opened[entry.source] for entry in entries])
    # Those that take prompts have them now.
    entries = [replace(entry, model=opened[entry.source].model) for entry in entries]
    name = evaluator.train.slug
    folder = settings.out if settings.out is not None else new_folder("compare", name)
    with Run(folder, "compare", settings, overwrite=settings.overwrite) as run:
        print(f"run folder: {run.folder}", file=sys.stderr)
        found = compare(entries, evaluator, sorted(set(settings.steps)))
        write(found, entries, evaluator, run)
        print(f"report: {run.path('report.html')}, numbers: {run.path('compare.json')}")
