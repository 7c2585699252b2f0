"""Scores, pictures and pages of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.flows.integration import Trajectory
from rectiflow.flows.metrics import straightness, transport_cost
from rectiflow.flows.sampling import sample
from rectiflow.training.figures import compare_samples, compare_trajectories, curves
from rectiflow.training.progress import Stopwatch, bar, clock
from rectiflow.training.records import read_log
from rectiflow.training.report import Section, Table, cell, write_report
from rectiflow.training.runs import plain

if TYPE_CHECKING:
    from rectiflow.distill.chain import ChainSettings, Stage
    from rectiflow.training.evaluation import Evaluator, Scores
    from rectiflow.training.runs import Run

SHOWN = 64
"""Images in a sheet."""
TRACED = 60
"""Paths drawn."""


@dataclass(frozen=True)
class Row:
    """What the table shows of one model.

    Attributes:
        title: the model.
        scores: number of steps to scores.
        straightness: S by 50 Euler steps.
        transport_cost: mean squared distance of noise and sample, 50 Euler steps.
        seconds: wall time of making the model.
        seconds_per_thousand: wall time of 1,000 samples by number of steps.
    """

    title: str
    scores: dict[int, Scores]
    straightness: float
    transport_cost: float
    seconds: float
    seconds_per_thousand: dict[int, float]


def score(stage: Stage, evaluator: Evaluator, counts: Sequence[int]) -> Row:
    """Score a model at several numbers of Euler steps, all from the same noises."""
    model = stage.model
    source, condition = evaluator.noises(model)
    scores, speeds = {}, {}
    ends = source
    with bar(f"score {stage.title}", sum(counts), unit="steps") as progress:
        for index, steps in enumerate(counts):
            with Stopwatch() as watch:
                ends = sample(model, source=source, steps=steps, solver="euler", **condition)
                images = evaluator.images(ends)
            speeds[steps] = 1000 * watch.seconds / len(source)
            scores[steps] = evaluator.compare(images)
            progress.update(sum(counts[: index + 1]))
    first = {name: rows[:1000] for name, rows in condition.items()}
    straight = straightness(model, source[:1000], max(counts), **first)
    cost = transport_cost(source, ends)
    return Row(stage.title, scores, straight.total, cost, stage.seconds, speeds)


def draw(stages: Sequence[Stage], evaluator: Evaluator, run: Run) -> None:
    """Sheets from the same noises and paths in one plane, before and after."""
    panels = {}
    paths = {}
    for stage in stages:
        source, condition = evaluator.noises(stage.model)
        rows = {name: value[:SHOWN] for name, value in condition.items()}
        for steps in (1, 50):
            word = "step" if steps == 1 else "steps"
            images = sample(stage.model, source=source[:SHOWN], steps=steps, solver="euler", **rows)
            panels[f"{stage.title}, {steps} {word}"] = images
        if stage.key != "one-step":
            seen = Trajectory()
            rows = {name: value[:TRACED] for name, value in condition.items()}
            sample(
                stage.model,
                source=source[:TRACED],
                steps=50,
                solver="euler",
                correctors=(seen,),
                **rows,
            )
            paths[stage.title] = seen.states
    ordered = {name: panels[name] for steps in (1, 50) for name in panels if f" {steps} " in name}
    compare_samples(ordered, run.path("samples.png"), title="The same noises through every model")
    data = evaluator.train.batch(torch.arange(min(500, len(evaluator.train))))
    compare_trajectories(
        paths,
        run.path("trajectories.png"),
        data=data,
        title="Paths from noise to samples, before and after reflow",
    )


def table(rows: Sequence[Row], floor: Scores, name: str, measure: str) -> Table:
    """A distance by model and number of steps, with its floor."""
    counts = list(rows[0].scores)
    lines: list[list[Any]] = [
        [row.title, *(getattr(row.scores[steps], measure) for steps in counts)] for row in rows
    ]
    lines.append(["floor: train vs. test", *[getattr(floor, measure)] * len(counts)])
    header = [name, *(f"{steps} step{'s' if steps > 1 else ''}" for steps in counts)]
    return Table(
        header, lines, caption="Lower is better. Euler steps; distance to the training set."
    )


def facts(rows: Sequence[Row]) -> Table:
    """Straightness, cost and times by model."""
    header = [
        "model",
        "straightness S",
        "transport cost",
        "made in",
        "1,000 images, 1 step",
        "1,000 images, 50 steps",
    ]
    lines = [
        [
            row.title,
            row.straightness,
            row.transport_cost,
            clock(row.seconds) if row.seconds else "earlier",
            f"{1000 * row.seconds_per_thousand[1]:.3g} ms",
            f"{1000 * row.seconds_per_thousand[50]:.3g} ms",
        ]
        for row in rows
    ]
    return Table(header, lines)


def print_table(rows: Sequence[Row], floor: Scores, name: str) -> None:
    """The tables as text."""
    measures = [(name, "fd")]
    if floor.fd_pixels is not None:
        measures.append(("fd_pixels", "fd_pixels"))
    print_tables(
        [*(table(rows, floor, title, measure) for title, measure in measures), facts(rows)]
    )


def print_tables(tables: Sequence[Table]) -> None:
    """Tables as aligned text."""
    for shown in tables:
        lines = [list(shown.header), *([cell(value) for value in row] for row in shown.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        for line in lines:
            first, *rest = (text.rjust(width) for text, width in zip(line, widths))
            print("  ".join([line[0].ljust(len(first)), *rest]))
        print()


def write(
    rows: Sequence[Row],
    floor: Scores,
    stages: Sequence[Stage],
    evaluator: Evaluator,
    chain: ChainSettings,
    run: Run,
) -> None:
    """The report."""
    counts = list(rows[0].scores)
    curves(
        {row.title: (counts, [row.scores[steps].fd for steps in counts]) for row in rows},
        run.path("distance.png"),
        across="Euler steps",
        up=evaluator.name,
        floor=("train vs. test", floor.fd),
        logarithmic="xy",
    )
    logs = {stage.title: read_log(stage.folder / "metrics.jsonl") for stage in stages}
    curves(
        {
            title: ([row["step"] for row in log], [row["loss"] for row in log])
            for title, log in logs.items()
        },
        run.path("loss.png"),
        across="training step",
        up="loss (mean over dimensions)",
    )
    first, last = rows[0], rows[-1]
    tables = [table(rows, floor, evaluator.name, "fd")]
    if floor.fd_pixels is not None:
        tables.append(table(rows, floor, "fd_pixels", "fd_pixels"))
    manifold = Table(
        ["precision / recall", *(str(steps) for steps in counts)],
        [
            [row.title, *(f"{s.precision:.2f} / {s.recall:.2f}" for s in row.scores.values())]
            for row in rows
        ]
        + [["test set", *[f"{floor.precision:.2f} / {floor.recall:.2f}"] * len(counts)]],
        caption="Share of samples inside the data's manifold, and of data inside the samples'.",
    )
    one, many = min(counts), max(counts)
    accuracy = evaluator.features.accuracy
    judge = f" (test accuracy {accuracy:.1%})" if accuracy is not None else ""
    lead = [
        f"A flow trained on {evaluator.train.name}, reflowed on its own pairs and distilled: "
        f"{evaluator.name} in one step falls from {cell(first.scores[one].fd)} to "
        f"{cell(last.scores[one].fd)}; the first flow takes {many} steps to reach "
        f"{cell(first.scores[many].fd)}. Fresh data score {cell(floor.fd)}.",
    ]
    write_report(
        run.path("report.html"),
        f"One-step generator on {evaluator.train.name}",
        [
            Section(
                "Quality by number of steps",
                texts=[
                    f"{evaluator.name} is the Fréchet distance of features of a small classifier "
                    f"trained on the same data{judge}; fd_pixels is that of raw pixels in [-1, 1]. "
                    f"{evaluator.count} samples each, from the same noises."
                ],
                tables=[*tables, manifold],
                pictures={run.path("distance.png"): "Distance against number of Euler steps."},
            ),
            Section("Straightness, cost and time", tables=[facts(rows)]),
            Section(
                "Pictures",
                pictures={
                    run.path("samples.png"): "Samples of every model from the same noises.",
                    run.path("trajectories.png"): "Paths in the plane of the data's two main "
                    "directions: straighter after reflow.",
                    run.path("loss.png"): "Training losses. Reflow's falls below the first flow's "
                    "because its pairs leave less to guess.",
                },
            ),
            Section(
                "How it was made",
                facts={
                    "lineage": stages[-1].model.lineage,
                    "stages": plain(chain),
                    "settings": run.record["settings"],
                    "environment": run.record["environment"],
                },
            ),
        ],
        lead=lead,
    )
