from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.flows import FlowModel
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.recipes import instaflow
from rectiflow.recipes.instaflow import AGAIN, ARMS, REFLOWED, TEACHER, Score, Settings, _checks
from rectiflow.recipes.recipe import load_recipe, run_recipe
from rectiflow.recipes.tools import new_net
from rectiflow.training.runs import Run


def states(**changes: float) -> list[str]:
    """States of the checks for the numbers that the specification measured, with changes."""
    found = {
        "teacher_1": 0.157, "teacher_2": 0.024, "reflowed_1": 0.053, "reflowed_2": 0.0094,
        "again_1": 0.121, "again_2": 0.038, "calls": 1.0, "accuracy": 0.965, **changes,
    }  # fmt: skip
    rows = {
        TEACHER: (found["teacher_1"], found["teacher_2"], 2.0),
        REFLOWED: (found["reflowed_1"], found["reflowed_2"], found["calls"]),
        AGAIN: (found["again_1"], found["again_2"], 2.0),
    }
    arms = {
        name: [{n: Score(0.0, e, found["accuracy"], n * calls) for n, e in ((1, a), (2, b))}]
        for name, (a, b, calls) in rows.items()
    }
    return [check.state for check in _checks(arms, replace(Settings(), steps=(1, 2)))]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert set(states()) == {"pass"}
    assert states(reflowed_1=0.08, again_1=0.17)[0] == "weak"
    # More than 0.7 of the teacher's.
    assert states(reflowed_1=0.12, again_1=0.3)[0] == "fail"
    assert states(reflowed_2=0.013)[1] == "fail"
    assert states(calls=1.5)[2] == "fail"
    assert states(again_1=0.07)[3] == "weak"
    assert states(again_2=0.009)[3] == "fail"
    assert states(accuracy=0.94)[4] == "fail"
    assert states(accuracy=math.nan)[4] == "fail"


def test_default_and_paper_follow_the_specification() -> None:
    default, paper = (instaflow.PRESETS[name] for name in ("default", "paper"))
    assert (default.flow.steps, [s.steps for s in default.reflow]) == (2500, [1500])
    assert (default.distil.steps, default.direct.steps, default.pairs) == (500, 1500, 8000)
    assert (default.pair_steps, default.guidance, default.again) == (25, 2.0, 1.5)
    assert (default.flow_dropout, default.reflow_dropout) == (0.15, 0.1)
    assert [(s.steps, s.batch_size) for s in paper.reflow] == [(70_000, 64), (25_000, 1024)]
    assert (paper.guidance, paper.student_guidance, paper.pairs) == (5.0, 1.5, 1_600_000)
    net = new_net(default.net, seed=0, shape=(1, 8, 8), classes=10, **default.net_options)
    # 54,752 of the unconditional one, and eleven embeddings of 32 numbers.
    assert sum(p.numel() for p in net.parameters()) == 54_752 + 11 * 32


def test_evaluations_are_those_of_the_network() -> None:
    net = new_net("mlp", seed=0, shape=(2,), width=4, depth=1, classes=3)
    model = FlowModel(net, shape=(2,))
    source, condition = torch.zeros(7, 2), {"label": torch.zeros(7, dtype=torch.int64)}
    for scale, expected in ((2.0, 6.0), (1.0, 3.0)):
        field = ClassifierFreeGuidance(model, scale)
        assert instaflow._follow(field, source, 3, condition)[1] == expected
    assert instaflow._follow(model, source, 3, condition)[1] == 3


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("instaflow", tmp_path)
    assert len(found.table["checks"]) == 5
    assert found.arms == set(ARMS)
    assert found.pictures == 2
    calls = next(c for c in found.table["checks"] if c["name"].startswith("network evaluations"))
    assert calls["values"] == [2.0]
    assert any("does not test it" in note for note in found.table["notes"])


def test_stages_run_on_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.interop.pipelines import MANY, shared

    monkeypatch.setenv("RECTIFLOW_CACHE", str(tmp_path / "cache"))
    shared("sd").save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(MANY))
    quick = instaflow.PRESETS["quick"]
    short = replace(quick.distil, steps=1, batch_size=4)
    settings = replace(
        quick,
        teacher=str(tmp_path / "pipe"),
        prompts=f"prompts:{tmp_path / 'prompts.txt'}",
        reflow=(short, short),
        distil=short,
        direct=short,
        pairs=8,
        pair_steps=2,
        steps=(1, 2),
        samples=80,
    )
    with Run(tmp_path / "run", "run") as run:
        result = run_recipe(load_recipe("instaflow"), settings, run, preset="quick")
    assert len(result.checks) == 4
    assert not any("accuracy" in number.quantity for number in result.numbers)
