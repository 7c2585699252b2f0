"""`rectiflow grid`: fit a model's times to where its trajectories bend, and keep them with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.judging import JudgeOptions
from rectiflow.cli.options import counting, plain_warnings
from rectiflow.cli.settings import parse
from rectiflow.errors import positive

if TYPE_CHECKING:
    from rectiflow.cli.models import Opened
    from rectiflow.flows.fields import FlowModel
    from rectiflow.training.evaluation import Evaluator
    from rectiflow.training.runs import Run


@dataclass(frozen=True)
class Settings(JudgeOptions):
    """Settings of `rectiflow grid`."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """Model folder or diffusers pipeline, here or on the Hub."""
    steps: int = 8
    """Euler steps that the model is to be sampled with."""
    against: tuple[int, ...] = (2, 4, 8, 16)
    """Numbers of steps at which the fitted grid is scored against the equal one; nothing after the
    flag to leave the scores out."""
    measured: int = 256
    """Samples that the bending is measured on."""
    seed: int = 0
    """Seed of their noises."""
    out: Path | None = None
    """Folder for the model, grid.json and grid.png; runs/grid-NAME-TIME by default."""
    overwrite: bool = False
    """Write over what is in --out."""

    def __post_init__(self) -> None:
        self.check_scores((self.steps, *self.against))
        positive("measured", self.measured)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="grid", summary=COMMANDS["grid"].summary)
    with plain_warnings():
        _grid(settings)
    return 0


def _grid(settings: Settings) -> None:
    """Fit the times, score them, save the model with them."""
    from rectiflow.training.runs import Run, new_folder

    opened = settings.open(settings.model)
    model = opened.model
    if "made_for" in model.sampling:
        raise ValueError(
            f"the model was distilled to {model.sampling['made_for']} step(s) at times of its own: "
            "fit a grid to the flow it was distilled from"
        )
    name = str(model.data.get("name", ""))
    folder = settings.out if settings.out is not None else new_folder("grid", name)
    evaluator = settings.evaluator([opened]) if settings.against else None
    if evaluator is None:
        settings.attach([opened])
    with Run(folder, "grid", settings, overwrite=settings.overwrite) as run:
        print(f"run folder: {run.folder}", file=sys.stderr)
        times = fit(opened, settings, evaluator, run)
        # As it was given: prompts do not belong to a model.
        model.sampling = {"solver": "euler", "steps": times}
        made = {"method": "fitted grid", "evaluations": settings.steps}
        model.lineage = [*model.lineage, made]
        model.save_pretrained(run.path("model"), overwrite=True)
        print(f"times for {settings.steps} steps: " + " ".join(f"{t:.3f}" for t in times))
        print(f"model: {run.path('model')}")


def fit(opened: Opened, settings: Settings, evaluator: Evaluator | None, run: Run) -> list[float]:
    """Grids and their scores; the one that was asked for."""
    import torch

    from rectiflow.files import write_json
    from rectiflow.flows import adaptive_times
    from rectiflow.flows.sampling import draw_source

    model = opened.model
    generator = torch.Generator().manual_seed(settings.seed)
    source = draw_source(model, settings.measured, generator=generator)
    condition = {}
    if opened.prompts:
        condition = opened.condition(settings.measured)
    elif model.conditional:
        conditions = settings.judging_data(opened)[0]
        rows = torch.randint(len(conditions), (settings.measured,), generator=generator)
        condition = {k: v.to(source.device) for k, v in conditions.condition(rows).items()}
    counts = sorted({settings.steps, *settings.against})
    with counting("measure", len(counts), "grids") as update:
        grids = {}
        for done, count in enumerate(counts, 1):
            grids[count] = adaptive_times(model, count, source=source, **condition)
            update(done)
    found: dict[str, object] = {"times": {str(count): grid for count, grid in grids.items()}}
    if evaluator is not None:
        found |= _scores(model, {n: grids[n] for n in settings.against}, evaluator, run)
    write_json(run.path("grid.json"), found)
    return grids[settings.steps]


def _scores(
    model: FlowModel, grids: dict[int, list[float]], evaluator: Evaluator, run: Run
) -> dict[str, object]:
    """Distances on equal and fitted grids: printed, drawn, returned."""
    from rectiflow.training.figures import curves
    from rectiflow.training.report import cell

    equal: dict[int, float] = {}
    fitted: dict[int, float] = {}
    with counting("score", 2 * len(grids) * evaluator.count, "samples") as update:
        for index, (count, grid) in enumerate(sorted(grids.items())):
            base = 2 * index * evaluator.count
            equal[count] = evaluator.score(model, steps=count, solver="euler").fd
            update(base + evaluator.count)
            fitted[count] = evaluator.score(model, steps=grid, solver="euler").fd
            update(base + 2 * evaluator.count)
    floor = evaluator.floor().fd
    print(f"{'steps':>6}  {'equal steps':>11}  {'fitted grid':>11}   {evaluator.name}")
    for count in equal:
        print(f"{count:>6}  {cell(equal[count]):>11}  {cell(fitted[count]):>11}")
    better = [str(count) for count in equal if fitted[count] < equal[count]]
    said = f"the fitted grid is closer to the data at {', '.join(better)} steps" if better else ""
    print(said or "the fitted grid is nowhere closer to the data than equal steps")
    drawn = curves(
        {
            "equal steps": (list(equal), list(equal.values())),
            "fitted grid": (list(fitted), list(fitted.values())),
        },
        run.path("grid.png"),
        across="Euler steps",
        up=evaluator.name,
        floor=("train vs. test", floor),
        logarithmic="xy",
    )
    print(f"figure: {drawn}")
    return {"distance": evaluator.name, "equal": equal, "fitted": fitted, "floor": floor}
