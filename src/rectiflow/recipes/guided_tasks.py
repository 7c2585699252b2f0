"""What the stages of InstaFlow run on: labelled images, or a pipeline and its prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.files import cache_folder
from rectiflow.flows.couplings import Data, Independent
from rectiflow.flows.fields import FlowModel
from rectiflow.recipes.tools import new_model, train
from rectiflow.training.data import load
from rectiflow.training.evaluation import load_features
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings


@dataclass(frozen=True)
class Task:
    """What the stages run on.

    Attributes:
        data: its conditions.
        features: samples to vectors for the distance.
        classes: samples to labels, where there are classes.
        teacher: makes the teacher of a seed.
        start: makes the flow that reflow starts from, given the teacher.
    """

    data: Data
    features: Callable[[Tensor], Tensor]
    classes: Callable[[Tensor], Tensor] | None
    teacher: Callable[[int], FlowModel]
    start: Callable[[FlowModel], FlowModel]


def labelled_images(
    data: str,
    net: str,
    options: Mapping[str, Any],
    flow: TrainerSettings,
    dropout: float,
) -> Task:
    """Labelled images, with a teacher trained on them."""
    images, held = (load(data, split=s) for s in ("train", "test"))
    features = load_features(images, held, kind="classifier", cache=cache_folder())
    # Where the trainer puts the flows.
    features = features.to("cuda" if torch.cuda.is_available() else "cpu")

    def teacher(seed: int) -> FlowModel:
        start = new_model(net, images.shape, seed=seed, classes=len(images.classes), **options)
        method = FlowMatching(start, Independent(images), condition_dropout=dropout)
        return train(method, replace(flow, seed=seed), title="teacher")

    def classes(samples: Tensor) -> Tensor:
        judge: Any = features.net
        return judge.logits(samples).argmax(1)

    return Task(images, features, classes, teacher, lambda teacher: teacher)


def prompted_pipeline(source: str, file: str, init: str) -> Task:
    """A pipeline and a file of prompts; the teacher is read exactly, the start as `init` says."""
    from rectiflow.interop.diffusers import (
        encode_prompts,
        from_pipeline,
        open_pipeline,
        read_prompts,
        with_prompts,
    )

    prompts = read_prompts(file)
    pipe = open_pipeline(source)
    table = encode_prompts(pipe, prompts)
    teacher = with_prompts(from_pipeline(pipe, init="analytic"), table)
    start = with_prompts(from_pipeline(pipe, init=init), table)
    # Means over patches: the covariance of whole latents has too many numbers to estimate.
    pool = nn.AdaptiveAvgPool2d(4)
    return Task(
        table, lambda x: pool(x).flatten(1), None, lambda seed: teacher, lambda teacher: start
    )
