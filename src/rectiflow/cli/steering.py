"""Steering from words, such as `classifier:3,step=0.05` or `inpaint:photo.png,mask=keep.png`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.cli.inverse_tasks import TASKS, cost_of, degradation_of
from rectiflow.errors import unknown

if TYPE_CHECKING:
    from rectiflow.cli.models import Opened
    from rectiflow.guidance import Cost, FlowChef


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]


# Key of the words: the argument of `FlowChef`, what makes it of text, and how it is written.
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "step": ("step_size", float, "a number"),
    "inner": ("inner", int, "a whole number"),
    "optimizer": ("optimizer", str, "a name"),
    "schedule": ("schedule", str, "a name"),
    "max": ("max_steps", int, "a whole number"),
    "until": ("until", float, "a number"),
    "skip": ("skip", _yes, "yes or no"),
}
PROBLEM = ("mask", "degradation")
KINDS = ("classifier", *TASKS)


def steering(text: str, opened: Opened) -> tuple[FlowChef]:
    """The corrector of a word, for samples of an opened model.

    Args:
        text: `classifier:LABEL`, or a task (inpaint, sr, deblur, colour) with the picture to
            agree with, `TASK:IMAGE`, and `mask=FILE` or `degradation=WORDS`; for all of them
            `step=`, `inner=`, `optimizer=`, `schedule=`, `max=`, `until=`, `skip=yes|no`.
        opened: the model.

    Raises:
        ValueError: an unknown word or key, a value that does not belong to it, a class that the
            data do not have, or a picture or mask that does not fit.
        FileNotFoundError: a picture or mask that is not there.
    """
    from rectiflow.guidance import FlowChef

    kind, value, options = _split(text)
    problem = {key: options.pop(key) for key in PROBLEM if key in options}
    arguments = {}
    for key, given in options.items():
        if key not in OPTIONS:
            raise unknown("option of --steer", key, (*OPTIONS, *PROBLEM))
        name, convert, form = OPTIONS[key]
        try:
            arguments[name] = convert(given)
        except (ValueError, KeyError):
            raise ValueError(f"{key} of --steer must be {form}, got {given!r}") from None
    if kind == "classifier":
        if problem:
            raise ValueError(f"--steer classifier takes no {', '.join(problem)}")
        cost = _classifier(value, opened)
    else:
        cost = _measurement(kind, value, problem, opened)
    return (FlowChef(cost, **arguments),)


def _split(text: str) -> tuple[str, str, dict[str, str]]:
    """The kind, its value and the options."""
    head, *rest = text.split(",")
    kind, _, value = head.partition(":")
    if kind not in KINDS:
        raise unknown("steering", kind, KINDS)
    if not value:
        raise ValueError(
            f"--steer {kind} needs a value: {kind}:{'LABEL' if kind == 'classifier' else 'IMAGE'}"
        )
    options = {}
    for part in rest:
        key, equals, given = part.partition("=")
        if not equals:
            raise ValueError(f"options of --steer are KEY=VALUE, got {part!r}")
        options[key] = given
    return kind, value, options


def _classifier(value: str, opened: Opened) -> Cost:
    """Minus the log-probability of a class, by a classifier trained on the model's own data."""
    from rectiflow.cli.options import data_of
    from rectiflow.files import cache_folder
    from rectiflow.guidance import Classifier, Decoded
    from rectiflow.training.evaluation import load_features

    train, test = (data_of(opened.model, split) for split in ("train", "test"))
    if value not in train.classes:
        raise unknown("class", value, train.classes)
    features = load_features(train, test, kind="classifier", cache=cache_folder())
    judge: Any = features.to(opened.device).net
    cost = Classifier(judge.logits, train.classes.index(value))
    return cost if opened.pipe is None else Decoded(cost, opened.images)


def _measurement(kind: str, value: str, problem: dict[str, str], opened: Opened) -> Cost:
    """How far the samples are from what the task leaves of one picture."""
    from rectiflow.cli.pictures import picture_shape, read_images

    shape = picture_shape(opened)
    mask = Path(problem["mask"]) if "mask" in problem else None
    _, operator = degradation_of(kind, shape, mask=mask, named=problem.get("degradation"))
    image = read_images([Path(value)], shape)
    return cost_of(opened, operator, operator.A(image).to(opened.device))
