"""`rectiflow evaluate`: score a model against its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.judging import JudgeOptions
from rectiflow.cli.options import check_guidance, counting, guided_by, plain_warnings
from rectiflow.cli.settings import parse


@dataclass(frozen=True)
class Settings(JudgeOptions):
    """Settings of `rectiflow evaluate`."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """Model folder or diffusers pipeline, here or on the Hub."""
    steps: tuple[int, ...] = (1, 2, 4, 10, 50)
    """Numbers of solver steps."""
    solver: str = "euler"
    """euler, heun, midpoint, rk4, dopri5, sde or renoise."""
    guidance: float | str | None = None
    """Guidance of a conditional model, as for `rectiflow sample`."""
    out: Path | None = None
    """JSON file for the scores."""
    overwrite: bool = False
    """Write over --out."""

    def __post_init__(self) -> None:
        self.check_scores(self.steps)
        check_guidance(self.guidance)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="evaluate", summary=COMMANDS["evaluate"].summary)
    if settings.out is not None and settings.out.exists() and not settings.overwrite:
        raise FileExistsError(f"{settings.out} exists: choose another --out or pass --overwrite")
    with plain_warnings():
        _evaluate(settings)
    return 0


def _evaluate(settings: Settings) -> None:
    """Score the model, print the table, write it to --out."""
    from rectiflow.files import write_json
    from rectiflow.flows.metrics import straightness, transport_cost
    from rectiflow.flows.sampling import sample
    from rectiflow.training.report import cell

    opened = settings.open(settings.model)
    evaluator = settings.evaluator([opened])
    model = opened.model
    guided = None if settings.guidance is None else guided_by(model, settings.guidance)
    floor = evaluator.floor()
    rows = {}
    with counting("evaluate", settings.samples * len(settings.steps), "samples") as update:
        for index, steps in enumerate(settings.steps):
            rows[steps] = evaluator.score(
                model,
                steps=steps,
                solver=settings.solver,
                field=guided,
                progress=lambda done, base=index * settings.samples: update(base + done),
            )
    source, condition = evaluator.noises(model)
    ends = sample(
        model, source=source, steps=max(settings.steps), solver="euler", field=guided, **condition
    )
    first = {name: rows[:1000] for name, rows in condition.items()}
    straight = straightness(guided or model, source[:1000], 50, **first)
    header = (
        f"{'steps':>6}  {evaluator.name:>14}  {'fd_pixels':>9}  {'precision':>9}  {'recall':>6}"
    )
    print(header)
    for label, score in [*rows.items(), ("floor", floor)]:
        print(
            f"{label!s:>6}  {cell(score.fd):>14}  {cell(score.fd_pixels):>9}  "
            f"{cell(score.precision):>9}  {cell(score.recall):>6}"
        )
    cost = transport_cost(source, ends)
    print(f"straightness S {straight.total:.3g}, transport cost {cost:.4g}")
    if settings.out is not None:
        write_json(
            settings.out,
            {
                "model": settings.model,
                "data": evaluator.train.name,
                "distance": evaluator.name,
                "solver": settings.solver,
                "guidance": settings.guidance,
                "scores": {str(steps): asdict(score) for steps, score in rows.items()},
                "floor": asdict(floor),
                "straightness": straight.total,
                "transport_cost": cost,
            },
        )
        print(f"scores: {settings.out}")
