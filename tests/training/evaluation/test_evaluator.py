"""The evaluator: one judge for all models, whatever their solver or their space."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import FlowModel
from rectiflow.training.data import load
from rectiflow.training.evaluation import Evaluator


@pytest.fixture(scope="module")
def images():
    return load("digits").subset(range(60)), load("digits", split="test").subset(range(40))


def judge(images, **options) -> Evaluator:
    return Evaluator(*images, count=40, features="random", **options)


def test_random_solvers_score_the_same_twice(images):
    few = {"solver": "renoise", "steps": [0.0, 0.5, 1.0]}
    model = FlowModel(lambda x, t: -x, shape=(1, 8, 8), sampling=few)
    evaluator = judge(images)
    first = evaluator.score(model)
    torch.manual_seed(7)
    assert evaluator.score(model) == first
    # What the solver draws is not the noise that the samples start from.
    source, _ = evaluator.noises(model)
    fresh = torch.randn(source.shape, generator=evaluator.randomness())
    assert abs(float((source * fresh).mean())) < 0.1


def test_samples_of_another_space_are_decoded(images):
    model = FlowModel(lambda x, t: torch.zeros_like(x), shape=(2, 4, 4))

    def decode(samples):
        assert len(samples) <= 16
        return samples.reshape(-1, 1, 4, 8).repeat_interleave(2, 2) / 3

    evaluator = judge(images, decode=decode)
    samples = torch.randn(40, 2, 4, 4)
    assert evaluator.images(samples).shape == (40, 1, 8, 8)
    source, _ = evaluator.noises(model)
    assert evaluator.score(model, steps=1) == evaluator.compare(evaluator.images(source))


def test_conditions_may_be_other_than_labels(images):
    seen = []

    def net(x, t, *, prompt):
        seen.append(prompt)
        return -x

    net.conditional = True
    evaluator = judge(images, condition=lambda rows: {"prompt": rows % 3})
    model = FlowModel(net, shape=(1, 8, 8))
    evaluator.score(model, steps=1)
    rows = torch.randint(60, (40,), generator=_after_noises(model))
    assert torch.equal(torch.cat(seen), rows % 3)


def _after_noises(model) -> torch.Generator:
    generator = torch.Generator().manual_seed(1234)
    torch.randn(40, *model.shape, generator=generator)
    return generator
