"""Scores, pictures and the page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.distill.chain import Stage
from rectiflow.distill.chain_page import SHOWN, Row, print_tables, score, table
from rectiflow.distill.rounds import measure_rounds, rounds_section
from rectiflow.files import write_json
from rectiflow.flows.first_order_gap import FirstOrderGap
from rectiflow.flows.sampling import sample
from rectiflow.training.comparison import (
    FOLLOWED,
    AsMade,
    Compared,
    describe_sampling,
    gap_in_time,
    lineage_table,
    own_steps,
    score_as_made,
)
from rectiflow.training.figures import compare_samples, curves
from rectiflow.training.report import Section, Table, cell, write_report

if TYPE_CHECKING:
    from rectiflow.training.evaluation import Evaluator, Scores
    from rectiflow.training.runs import Run

FOLLOWED_SAMPLES = 1000
"""Trajectories by which the gap is measured."""


@dataclass(frozen=True)
class Side:
    """One model's part of the page.

    Attributes:
        row: scores, speeds, straightness and cost by Euler steps.
        as_made: the same with the model's own solver and steps.
        gap: how far it is from first order, in bins of time.
    """

    row: Row
    as_made: AsMade
    gap: FirstOrderGap


def compare(entries: Sequence[Compared], evaluator: Evaluator, counts: Sequence[int]) -> list[Side]:
    """Measure every model on the same noises."""
    sides = []
    for entry in entries:
        model = entry.model
        source, condition = evaluator.noises(model)
        few = {name: rows[:FOLLOWED_SAMPLES] for name, rows in condition.items()}
        # The first call pays for what later ones find ready.
        sample(
            model,
            source=source[:64],
            steps=1,
            solver="euler",
            **{name: rows[:64] for name, rows in condition.items()},
        )
        row = score(Stage("", entry.title, model, Path(entry.source), 0.0), evaluator, counts)
        gap = gap_in_time(model, source[:FOLLOWED_SAMPLES], few)
        sides.append(Side(row, score_as_made(model, evaluator), gap))
    return sides


def write(
    sides: Sequence[Side], entries: Sequence[Compared], evaluator: Evaluator, run: Run
) -> None:
    """Numbers, pictures, the page, and the tables on the terminal."""
    floor = evaluator.floor()
    rounds = measure_rounds(entries, evaluator)
    facts = as_table(sides, entries, evaluator, floor)
    write_json(run.path("compare.json"), {**facts, "rounds": [one.facts() for one in rounds]})
    rows = [side.row for side in sides]
    tables = [table(rows, floor, evaluator.name, "fd")]
    if floor.fd_pixels is not None:
        tables.append(table(rows, floor, "fd_pixels", "fd_pixels"))
    made = made_table(sides, evaluator.name)
    print_tables([*tables, made])
    best = min(sides, key=lambda side: side.as_made.scores.fd)
    accuracy = evaluator.features.accuracy
    judge = f" (test accuracy {accuracy:.1%})" if accuracy is not None else ""
    write_report(
        run.path("report.html"),
        f"{len(sides)} models on {evaluator.train.name}",
        [
            Section(
                "Quality by number of steps and by time",
                texts=[
                    f"{evaluator.name} is the Fréchet distance of features{judge} to the training "
                    f"set; {evaluator.count} samples each, from the same noises."
                ],
                tables=tables,
                pictures=_quality(sides, evaluator.name, floor, run),
            ),
            Section("As they are meant to be used", tables=[made]),
            Section("Where they bend", pictures=_bends(sides, run)),
            *rounds_section(rounds),
            Section("Samples", pictures=_samples(entries, evaluator, rows, run)),
            Section(
                "Lineage",
                tables=[lineage_table(entries)],
                facts={entry.title: entry.model.lineage for entry in entries},
            ),
            Section(
                "How it was measured",
                facts={
                    "settings": run.record["settings"],
                    "environment": run.record["environment"],
                },
            ),
        ],
        lead=[
            f"Used as it is meant to be, {best.row.title} ({best.as_made.sampling}) is closest to "
            f"the data: {evaluator.name} {cell(best.as_made.scores.fd)}, where fresh data score "
            f"{cell(floor.fd)}."
        ],
    )


def made_table(sides: Sequence[Side], name: str) -> Table:
    """Each model with its own solver and steps."""
    header = ["model", "sampled by", name, "precision", "recall", "1,000 images"]
    header += ["straightness S", "first-order gap", "transport cost"]
    rows: list[list[Any]] = []
    for side in sides:
        own = side.as_made
        rows.append(
            [
                side.row.title,
                own.sampling,
                own.scores.fd,
                own.scores.precision,
                own.scores.recall,
                f"{own.seconds_per_thousand:.3g} s",
                side.row.straightness,
                side.gap.total,
                side.row.transport_cost,
            ]
        )
    return Table(header, rows, caption="Time is wall time on the machine named below.")


def as_table(
    sides: Sequence[Side], entries: Sequence[Compared], evaluator: Evaluator, floor: Scores
) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "data": evaluator.train.name,
        "distance": evaluator.name,
        "floor": asdict(floor),
        "models": [
            {
                "title": entry.title,
                "source": entry.source,
                "sampling": entry.model.sampling,
                "lineage": entry.model.lineage,
                "scores": {str(n): asdict(s) for n, s in side.row.scores.items()},
                "seconds_per_thousand": {
                    str(n): s for n, s in side.row.seconds_per_thousand.items()
                },
                "as_made": asdict(side.as_made),
                "straightness": side.row.straightness,
                "transport_cost": side.row.transport_cost,
                "first_order_gap": {
                    "total": side.gap.total,
                    "times": side.gap.times,
                    "values": side.gap.per_time.tolist(),
                },
            }
            for side, entry in zip(sides, entries)
        ],
    }


def _quality(sides: Sequence[Side], name: str, floor: Scores, run: Run) -> dict[Path, str]:
    """Distance over steps and over time."""
    steps, time = {}, {}
    for side in sides:
        row = side.row
        values = [scores.fd for scores in row.scores.values()]
        speeds = list(row.seconds_per_thousand.values())
        steps[row.title] = (list(row.scores), values)
        time[row.title] = (speeds, values)
    line = ("train vs. test", floor.fd)
    by_steps = curves(
        steps,
        run.path("by-steps.png"),
        across="Euler steps",
        up=name,
        floor=line,
        logarithmic="xy",
    )
    by_time = curves(
        time,
        run.path("by-time.png"),
        across="wall time of 1,000 images (s)",
        up=name,
        floor=line,
        logarithmic="xy",
        marked=False,
    )
    fewest = min(sides[0].row.scores)
    first = min(sides, key=lambda side: side.row.scores[fewest].fd)
    return {
        by_steps: f"In {fewest} step{'s' if fewest > 1 else ''} {first.row.title} is closest to "
        f"the data ({cell(first.row.scores[fewest].fd)}).",
        by_time: "The same against the wall time they took here.",
    }


def _bends(sides: Sequence[Side], run: Run) -> dict[Path, str]:
    """The first-order gap over time."""
    picture = curves(
        {side.row.title: (side.gap.times, side.gap.per_time.tolist()) for side in sides},
        run.path("gap.png"),
        across="time t (0 noise, 1 data)",
        up="first-order gap",
        logarithmic="y",
    )
    least = min(sides, key=lambda side: side.gap.total)
    straightest = min(sides, key=lambda side: side.row.straightness)
    return {
        picture: "How much the estimated noise changes along trajectories of "
        f"{FOLLOWED} first-order steps, in bins of time: where the gap is large, steps are needed. "
        f"The least is {least.row.title}'s ({cell(least.gap.total)}); straightest is "
        f"{straightest.row.title} (S {cell(straightest.row.straightness)}). Generators that were "
        "trained at the start of a step alone mean nothing in between."
    }


def _samples(
    entries: Sequence[Compared], evaluator: Evaluator, rows: Sequence[Row], run: Run
) -> dict[Path, str]:
    """Sheets from the same noises: in the fewest and most steps, and as made."""
    counts = list(rows[0].scores)
    panels = {}
    for entry in entries:
        source, condition = evaluator.noises(entry.model)
        first = {name: value[:SHOWN] for name, value in condition.items()}
        for steps in dict.fromkeys((counts[0], counts[-1])):
            word = "step" if steps == 1 else "steps"
            shown = sample(entry.model, source=source[:SHOWN], steps=steps, solver="euler", **first)
            panels[f"{entry.title}, {steps} {word}"] = evaluator.images(shown)
        own = entry.model.sampling["solver"] == "euler"
        if not own or own_steps(entry.model) not in (counts[0], counts[-1]):
            title = f"{entry.title}, as made ({describe_sampling(entry.model)})"
            generator = evaluator.randomness()
            shown = sample(entry.model, source=source[:SHOWN], generator=generator, **first)
            panels[title] = evaluator.images(shown)
    picture = compare_samples(
        panels, run.path("samples.png"), title="The same noises through every model"
    )
    return {picture: "Samples of every model from the same noises."}
