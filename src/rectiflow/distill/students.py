"""Students of any size: a network of its own beside the teacher's."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import torch
from torch import nn

from rectiflow.flows.fields import FlowModel
from rectiflow.flows.paths import RectifiedPath
from rectiflow.nets import build_spec
from rectiflow.nets.specs import parse_spec
from rectiflow.nets.stacked import Stacked


def new_student(
    teacher: FlowModel, student: str | nn.Module, *, keep_path: bool = False, seed: int = 0
) -> FlowModel:
    """A model for the teacher's samples and classes, with a network of another size.

    Args:
        teacher: says shape, classes and data.
        student: a network, a word such as `unet-7m` or `mlp:width=48,depth=2` for one with random
            weights, `stacked` for two copies of the teacher's network in series
            (`stacked:mode=residual`), or the folder of a trained model to start from.
        keep_path: put random weights on the teacher's path, predicting what it predicts; they are
            on straight lines, predicting velocities, otherwise.
        seed: decides the random weights.

    Raises:
        ValueError: an unknown network, a teacher without shape, a trained model whose samples
            or classes are not the teacher's, or a network without text for a teacher of prompts.

    Example:
        >>> from rectiflow.nets import build
        >>> teacher = FlowModel(build("mlp", shape=(2,), width=64, depth=2), shape=(2,))
        >>> new_student(teacher, "mlp:width=8,depth=1").net.config["width"]
        8
    """
    if teacher.shape is None:
        raise ValueError("the teacher does not know its sample shape: set shape=")
    classes = int(getattr(teacher.net, "classes", 0))
    if isinstance(student, str) and FilePath(student).is_dir():
        model = FlowModel.from_pretrained(student)
        theirs = int(getattr(model.net, "classes", 0))
        if (model.shape, theirs) != (teacher.shape, classes):
            raise ValueError(
                f"the student {student} makes samples of shape {model.shape} with {theirs} "
                f"classes, the teacher {teacher.shape} with {classes}: take a student of the same "
                "data"
            )
        return _check_text(teacher, model, student)
    if isinstance(student, str) and parse_spec(student)[0] == "stacked":
        config = parse_spec(student)[1]
        if set(config) <= {"mode"}:
            stack = Stacked.of(teacher.net, **config)
            return FlowModel(
                stack, teacher.path, teacher.prediction, shape=teacher.shape, data=teacher.data
            )
    word = student
    if isinstance(student, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = build_spec(student, shape=teacher.shape, classes=classes)
    options: dict[str, Any] = {"path": RectifiedPath()}
    if keep_path:
        options = {"path": teacher.path, "prediction": teacher.prediction}
    made = FlowModel(student, shape=teacher.shape, data=teacher.data, **options)
    return _check_text(teacher, made, word)


def _check_text(teacher: FlowModel, student: FlowModel, named: Any) -> FlowModel:
    """The student, if it takes the prompts that the teacher takes."""
    if teacher.conditional and not student.conditional:
        raise ValueError(
            f"the teacher takes prompts and {named} does not: take stacked, the folder of a model "
            "of the same pipeline, or no other student"
        )
    return student
