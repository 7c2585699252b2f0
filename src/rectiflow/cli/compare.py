"""`rectiflow compare`: models side by side on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import ScoreOptions, choose_device, judging_data
from rectiflow.cli.settings import parse


@dataclass(frozen=True)
class Settings(ScoreOptions):
    """Settings of `rectiflow compare`."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Model folders, run folders (of several stages too), or owner/name on the Hub."""
    data: str | None = None
    """Data to judge by; what the models were trained on by default."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    """Numbers of Euler steps."""
    out: Path | None = None
    """Folder for report.html, compare.json and pictures; runs/compare-TIME by default."""
    overwrite: bool = False
    """Write over what is in --out."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        self.check_scores(self.steps)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="compare", summary=COMMANDS["compare"].summary)
    from rectiflow.distill.comparison_page import compare, write
    from rectiflow.training.comparison import check_comparable, read_models
    from rectiflow.training.runs import Run, new_folder

    device = choose_device(settings.device)
    entries = read_models(settings.runs)
    check_comparable(entries, data=settings.data)
    for entry in entries:
        entry.model.to(device)
    train, test = judging_data(entries[0].model, settings.data)
    folder = settings.out if settings.out is not None else new_folder("compare", train.slug)
    with Run(folder, "compare", settings, overwrite=settings.overwrite) as run:
        print(f"run folder: {run.folder}", file=sys.stderr)
        evaluator = settings.evaluator(train, test)
        found = compare(entries, evaluator, sorted(set(settings.steps)))
        write(found, entries, evaluator, run)
        print(f"report: {run.path('report.html')}, numbers: {run.path('compare.json')}")
    return 0
