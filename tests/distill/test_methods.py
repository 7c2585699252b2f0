"""The table of few-step methods: every row builds, and says no in words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rectiflow.distill.few_step_method import Choices, Options
from rectiflow.distill.methods import METHODS, find_method, methods_of
from rectiflow.distill.reflow import KINDS
from rectiflow.distill.students import new_student
from rectiflow.flows import FlowModel, Independent, LivePairs, PseudoHuber, Uniform
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.nets import build
from rectiflow.recipes.catalog import find

SMALL = "mlp:width=8,depth=1"


def teacher(path=None, classes: int = 0) -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(2,), width=16, depth=1, zero=False, classes=classes)
    return FlowModel(net, path, shape=(2,), data={"name": "points"})


def made(name: str, model: FlowModel | None = None, **choices):
    entry = METHODS[name]
    model = model if model is not None else teacher(classes=3 * entry.conditional)
    if entry.student == "needed":
        choices = {"student": new_student(model, SMALL), **choices}
    data = TensorData(torch.randn(32, 2), {"label": torch.arange(32) % 3})
    labels = data if model.conditional else None
    coupling = LivePairs(model, 2, labels=labels) if entry.pairs else Independent(data.values)
    return entry.make(model, coupling, Choices(options=entry.options(), **choices))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_finite_loss_with_its_defaults(name):
    method = made(name)
    for phase in method.phases():
        loss = phase.loss(Draw.of(8))
        assert bool(loss.isfinite())
        assert loss.requires_grad
    assert method.model.shape == (2,)


@pytest.mark.parametrize("name", [n for n, e in METHODS.items() if e.student == "possible"])
def test_every_method_that_can_trains_another_student(name):
    model = teacher(classes=3 * METHODS[name].conditional)
    student = new_student(model, SMALL)
    assert made(name, model, student=student).model.net.config["width"] == 8


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_complete(name):
    entry = METHODS[name]
    assert entry.command in ("reflow", "distill")
    assert entry.student in ("possible", "needed", "impossible")
    assert entry.summary[0].islower()
    assert not entry.summary.endswith(".")
    assert all(find(system).slug == system for system in entry.systems)
    assert all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(entry.options)
    )
    facts = entry.entry(entry.options())
    assert facts["method"] == (entry.lineage or name)
    assert facts["systems"] == list(entry.systems)


def test_lineage_tells_the_methods_own_settings():
    entry = METHODS["annealing"]
    assert entry.entry(entry.options(schedule="cosine:9"))["schedule"] == "cosine:9"
    one = METHODS["one-step"]
    assert one.entry(one.options(steps=2)) == {
        "method": "distil",
        "student_steps": 2,
        "systems": ["rectified-flow"],
    }
    assert one.entry(one.options(encoder=True))["method"] == "encoder"
    assert METHODS["reflow"].entry(Options())["method"] == "reflow"


def test_choices_reach_the_method():
    method = made("reflow", times=Uniform(0.1), premetric=PseudoHuber(0.2), condition_dropout=0.1)
    assert (method.times, method.premetric) == (Uniform(0.1), PseudoHuber(0.2))
    assert method.condition_dropout == 0.1
    entry = METHODS["flow-guided"]
    options = entry.options(first_step="teacher", u_range=(0.1, 0.9), weight=2.0)
    model = teacher()
    guided = entry.make(model, LivePairs(model), Choices(options=options, guided=teacher()))
    assert (guided.first_step, guided.u_range, guided.weight) == ("teacher", (0.1, 0.9), 2.0)
    assert guided.guided is not None
    assert made("reflow").condition_dropout == 0
    assert made("text-reflow").condition_dropout == 0.1
    assert made("text-reflow", condition_dropout=0.0).condition_dropout == 0
    annealed = made("annealing", steps=800)
    assert annealed.schedule.ramp == 300


def test_incompatible_choices_are_refused_with_a_reason():
    model = teacher()
    with pytest.raises(ValueError, match=r"annealing trains a student of its own .* name one"):
        METHODS["annealing"].make(model, LivePairs(model), Choices())
    with pytest.raises(ValueError, match="is for teachers that take prompts or labels"):
        made("text-reflow", model)
    with pytest.raises(ValueError, match="one-step looks only at times of its own"):
        made("one-step", times=Uniform())
    curved = teacher(VariancePreservingPath())
    with pytest.raises(ValueError, match="flow-guided needs teacher and student on one path"):
        made("flow-guided", curved, student=new_student(curved, SMALL))
    with pytest.raises(ValueError, match="needs a model on the rectified path, got 'vp'"):
        made("one-step", curved)
    for name in ("consistency", "f-distill"):
        with pytest.raises(ValueError, match=f"{name} trains on no null condition of its own"):
            METHODS[name].make(model, LivePairs(model), Choices(condition_dropout=0.1))
    alone = dataclasses.replace(METHODS["reflow"], student="impossible")
    with pytest.raises(ValueError, match="goes on from the teacher's weights"):
        alone.make(model, LivePairs(model), Choices(student=new_student(model, SMALL)))


def test_lineage_counts_every_kind_of_reflow():
    assert {e.lineage or e.name for e in methods_of("reflow").values()} == KINDS


def test_names():
    assert {"reflow", "annealing"} <= set(methods_of("reflow"))
    assert {"one-step", "flow-guided"} <= set(methods_of("distill"))
    with pytest.raises(ValueError, match="unknown method 'one-stpe': did you mean 'one-step'"):
        find_method("one-stpe", "distill")
    with pytest.raises(ValueError, match="annealing belongs to rectiflow reflow"):
        find_method("annealing", "distill")
