"""Models side by side: what may be compared, how each is meant to be sampled, where it bends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.flows.artifact import CONFIG, identity
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.first_order_gap import FirstOrderGap, first_order_gap
from rectiflow.flows.sampling import sample
from rectiflow.training.progress import Stopwatch
from rectiflow.training.report import Table
from rectiflow.training.runs import MODEL, PIPELINE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.training.evaluation import Evaluator, Scores

BINS = 10
"""Bins of time in which a model's gap is averaged."""
FOLLOWED = 50
"""First-order steps by which trajectories are followed to measure it."""


@dataclass(frozen=True)
class Compared:
    """A model in a comparison.

    Attributes:
        title: what it is called there.
        source: the folder or Hub name it was read from.
        model: the model.
    """

    title: str
    source: str
    model: FlowModel


@dataclass(frozen=True)
class AsMade:
    """A model sampled with its own solver and steps.

    Attributes:
        sampling: solver and steps, in words.
        evaluations: number of its steps.
        scores: how close the samples are to the data.
        seconds_per_thousand: wall time of 1,000 samples.
    """

    sampling: str
    evaluations: int
    scores: Scores
    seconds_per_thousand: float


def find_models(place: str | Path) -> list[tuple[str, str]]:
    """Titles and folders of the models in a place: a model folder, a run folder or a pipeline.

    A run of several stages (`demo`) gives all its models, in the order in which each was made of
    the one before. What is no folder is taken for a name on the Hub.

    Raises:
        FileNotFoundError: a folder without a model.
    """
    folder = Path(place)
    if not folder.is_dir():
        return [(str(place).rstrip("/").rpartition("/")[2] or str(place), str(place))]
    if (folder / CONFIG).is_file():
        # A run keeps its model under the same name as all others do.
        own = folder.resolve()
        return [(own.parent.name if own.name == MODEL else own.name, str(folder))]
    if (folder / PIPELINE).is_file():
        return [(folder.resolve().name, str(folder))]
    if (folder / MODEL / CONFIG).is_file():
        return [(folder.resolve().name, str(folder / MODEL))]
    found = sorted(folder.glob(f"*/{MODEL}/{CONFIG}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no model in {folder} (looked for {CONFIG}, {MODEL}/{CONFIG} and */{MODEL}/{CONFIG})"
        )
    return [(file.parent.parent.name, str(file.parent)) for file in found]


def read_models(
    places: Sequence[str | Path], read: Callable[[str], FlowModel] = FlowModel.from_pretrained
) -> list[Compared]:
    """All models in some places, each under a title of its own.

    Args:
        places: model folders, run folders, pipelines, or names on the Hub.
        read: makes the model of one of them.

    Raises:
        ValueError: fewer than two models.
        FileNotFoundError: a place without a model.
    """
    found = [pair for place in places for pair in find_models(place)]
    if len(found) < 2:
        raise ValueError(
            f"a comparison needs two models or more, got {len(found)}: name several model or run "
            "folders"
        )
    entries: list[Compared] = []
    for title, source in found:
        taken = {entry.title for entry in entries}
        own, number = title, 2
        while own in taken:
            own, number = f"{title} ({number})", number + 1
        entries.append(Compared(own, source, read(source)))
    return entries


def check_comparable(entries: Sequence[Compared], *, data: str | None = None) -> None:
    """Refuse models of different shapes, or of different data unless `data` names some.

    Raises:
        ValueError: the first two that do not fit, in one sentence.
    """
    first = entries[0]
    for entry in entries:
        if entry.model.shape is None or len(entry.model.shape) != 3:
            raise ValueError(
                f"{entry.title} makes samples of shape {entry.model.shape}, not images "
                "(channels, height, width): only images can be compared"
            )
        if entry.model.shape != first.model.shape:
            raise ValueError(
                f"{first.title} makes images of {_sides(first.model)} and {entry.title} of "
                f"{_sides(entry.model)}: compare models of one shape"
            )
    if data is not None:
        return
    for entry in entries:
        if entry.model.data.get("spec") != first.model.data.get("spec"):
            ours, theirs = (e.model.data.get("spec", "unnamed data") for e in (first, entry))
            raise ValueError(
                f"{first.title} was trained on {ours} and {entry.title} on {theirs}: compare "
                "models of one data set, or name the data to judge them by with --data"
            )


def _sides(model: FlowModel) -> str:
    return "x".join(map(str, model.shape or ()))


def describe_sampling(model: FlowModel) -> str:
    """How a model is meant to be sampled, in words.

    Example:
        >>> describe_sampling(FlowModel(lambda x, t: x, sampling={"solver": "euler", "steps": 1}))
        'euler, 1 step'
    """
    count = own_steps(model)
    return f"{model.sampling['solver']}, {count} step{'s' if count > 1 else ''}"


def own_steps(model: FlowModel) -> int:
    """The number of steps that a model is meant to be sampled with."""
    steps = model.sampling["steps"]
    return steps if isinstance(steps, int) else len(steps) - 1


def score_as_made(model: FlowModel, evaluator: Evaluator) -> AsMade:
    """Score and time a model with its own solver and steps."""
    source, condition = evaluator.noises(model)
    with Stopwatch() as watch:
        made = sample(model, source=source, generator=evaluator.randomness(), **condition)
        images = evaluator.images(made)
    speed = 1000 * watch.seconds / len(source)
    return AsMade(describe_sampling(model), own_steps(model), evaluator.compare(images), speed)


def gap_in_time(
    model: FlowModel, source: Float[Tensor, "b *dims"], condition: dict[str, Any]
) -> FirstOrderGap:
    """The first-order gap in equal bins of time: where it is large, steps are needed.

    Unlike straightness it means the same on every path, so models of different paths compare.
    """
    return first_order_gap(model, source, FOLLOWED, bins=BINS, **condition)


def lineage_table(entries: Sequence[Compared]) -> Table:
    """What each model is and what was done to make it."""
    rows = []
    for entry in entries:
        model = entry.model
        steps = [e["steps"] for e in model.lineage if isinstance(e.get("steps"), int)]
        rows.append(
            [
                entry.title,
                " → ".join(str(e.get("method", "step")) for e in model.lineage) or "not recorded",
                sum(steps) if steps else None,
                f"{sum(p.numel() for p in model.parameters()):,}",
                getattr(model.net, "name", type(model.net).__name__),
                f"{model.path.name}, {model.prediction}",
                describe_sampling(model),
                (identity(model) or "")[:12],
            ]
        )
    header = [
        "model",
        "made by",
        "training steps",
        "parameters",
        "network",
        "path, prediction",
        "meant for",
        "weights",
    ]
    return Table(header, rows, caption="Training steps of the whole lineage together.")
