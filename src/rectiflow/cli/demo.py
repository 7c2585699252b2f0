"""`rectiflow demo`: data in, a one-step generator out: the whole chain, with a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import DataOptions, OutputOptions, plain_warnings
from rectiflow.cli.presets import chain_settings
from rectiflow.cli.settings import parse
from rectiflow.errors import BeyondDistilledStepsWarning, positive, unknown

if TYPE_CHECKING:
    from rectiflow.distill.chain import ChainSettings

STEPS = (1, 2, 4, 10, 50)


@dataclass(frozen=True)
class Settings(OutputOptions, DataOptions):
    """Settings of `rectiflow demo`."""

    preset: Literal["quick", "default"] = "default"
    """quick only shows that everything works; default takes minutes."""
    seed: int = 0
    """Seed of everything."""
    samples: int = 5000
    """Samples for each score."""

    def __post_init__(self) -> None:
        self.check_output()
        positive("samples", self.samples)
        if self.preset not in ("quick", "default"):
            raise unknown("preset", self.preset, ("quick", "default"))


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="demo", summary=COMMANDS["demo"].summary)
    # Every model is scored at every number of steps, on purpose.
    with plain_warnings(BeyondDistilledStepsWarning):
        train, test = settings.load(), settings.load("test")
        chain = replace(chain_settings(train.shape, settings.preset), seed=settings.seed)
        with settings.open("demo", train.slug) as run:
            run.used("rectified-flow")
            demonstrate(settings, chain, train, test, run)
    return 0


def demonstrate(settings: Settings, chain: ChainSettings, train: Any, test: Any, run: Any) -> None:
    """Run the chain, score every model, write pictures and report, print the table."""
    from rectiflow.distill.chain import make_one_step
    from rectiflow.distill.chain_page import draw, print_table, score, write
    from rectiflow.files import cache_folder, write_json
    from rectiflow.training.evaluation import Evaluator

    evaluator = Evaluator(
        train,
        test,
        count=min(settings.samples, 500) if settings.preset == "quick" else settings.samples,
        cache=cache_folder(),
    )
    floor = evaluator.floor()
    stages = make_one_step(train, chain, run.folder, spec=settings.data, resume=settings.resume)
    rows = [score(stage, evaluator, STEPS) for stage in stages]
    metrics = {
        "data": train.name,
        "distance": evaluator.name,
        "steps": list(STEPS),
        "floor": asdict(floor),
        "models": [asdict(row) for row in rows],
        "settings": run.record["settings"],
        "environment": run.record["environment"],
    }
    write_json(run.path("metrics.json"), metrics)
    draw(stages, evaluator, run)
    write(rows, floor, stages, evaluator, chain, run)
    print_table(rows, floor, evaluator.name)
    print(f"models, pictures and report: {run.folder} (open report.html)")
