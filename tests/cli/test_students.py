"""`rectiflow reflow` and `distill`: every method, the flags they share, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectiflow.cli import main
from rectiflow.cli.distill import Settings as DistillSettings
from rectiflow.cli.reflow import Settings as ReflowSettings
from rectiflow.cli.settings import from_toml
from rectiflow.distill import Reflow, profile
from rectiflow.distill.methods import METHODS, AnnealingOptions, methods_of
from rectiflow.flows import (
    FlowModel,
    Independent,
    LivePairs,
    PairSymmetry,
    PseudoHuber,
    Uniform,
    Weighted,
)
from rectiflow.flows.couplings import Draw
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.nets import build

SMALL = "mlp:width=8,depth=1,time_features=8"
SHORT = ["--steps", "3", "--batch-size", "8", "--teacher-steps", "2", "--log-every", "1"]


def save(folder: Path, classes: int = 0, path=None) -> str:
    """A teacher with random weights that says it knows the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(1, 8, 8), width=16, depth=1, classes=classes, zero=False)
    data = {"name": "digits", "spec": "digits", "size": None, "channels": None}
    model = FlowModel(net, path, shape=(1, 8, 8), data=data, lineage=[{"method": "flow"}])
    return str(model.save_pretrained(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "plain": save(folder / "plain"),
        "labelled": save(folder / "labelled", classes=10),
        "curved": save(folder / "curved", path=VariancePreservingPath()),
    }


def trained(words: list[str], out: Path) -> FlowModel:
    report = ["--report", "0"] if words[0] == "reflow" and "--report" not in words else []
    assert main([*words, *report, *SHORT, "--out", str(out)]) == 0
    return FlowModel.from_pretrained(out / "model")


def fails(words: list[str], capsys) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("rectiflow ")
    assert all(line.startswith(("note:", "warning:")) for line in lines[:-1])
    return lines[-1]


def test_annealing_makes_a_small_student(models, tmp_path):
    words = ["--method", "annealing", "--student", SMALL, "--annealing.schedule", "cosine:2"]
    student = trained(["reflow", models["plain"], *words], tmp_path / "a")
    assert student.net.config["width"] == 8
    first, second = student.lineage
    assert first["method"] == "flow"
    expected = {"method": "annealing", "schedule": "cosine:2", "student": SMALL}
    assert expected.items() <= second.items()
    assert second["systems"] == ["rectified-flow", "slimflow"]
    record = json.loads((tmp_path / "a/run.json").read_text())
    assert record["systems"] == ["rectified-flow", "slimflow"]
    assert record["settings"]["annealing"] == {"schedule": "cosine:2"}


def test_guided_distillation(models, tmp_path):
    words = ["--method", "flow-guided", "--flow-guided.first-step", "teacher"]
    words += ["--flow-guided.u-range", "0.1", "0.9", "--premetric", "pseudo-huber:0.1"]
    student = trained(["distill", models["plain"], *words], tmp_path / "a")
    assert student.sampling == {"solver": "euler", "steps": 1, "made_for": 1}
    expected = {"method": "flow-guided", "first_step": "teacher", "premetric": "pseudo-huber:0.1"}
    assert expected.items() <= student.lineage[-1].items()
    assert student.lineage[-1]["u_range"] == [0.1, 0.9]


def test_one_step_options_and_a_student_from_a_folder(models, tmp_path):
    small = FlowModel(build("mlp", shape=(1, 8, 8), width=4, depth=1), shape=(1, 8, 8))
    start = str(small.save_pretrained(tmp_path / "small"))
    words = ["--student", start, "--one-step.steps", "2"]
    student = trained(["distill", models["plain"], *words], tmp_path / "a")
    assert student.net.config["width"] == 4
    assert student.sampling["steps"] == 2
    assert (student.lineage[-1]["method"], student.lineage[-1]["student_steps"]) == ("distil", 2)
    encoder = trained(["distill", models["plain"], "--one-step.encoder"], tmp_path / "b")
    assert encoder.lineage[-1]["method"] == "encoder"
    assert encoder.sampling["steps"] == [1.0, 0.0]


def test_shared_flags_reach_the_method(models, tmp_path, monkeypatch):
    seen = []
    entry = METHODS["reflow"]

    def spy(teacher, coupling, choices):
        seen.append((coupling, choices))
        return entry.build(teacher, coupling, choices)

    monkeypatch.setitem(METHODS, "reflow", replace(entry, build=spy))
    words = ["--times", "uniform:0.1:0.9", "--premetric", "pseudo-huber", "--hflip"]
    words += ["--loss-weight", "clipped", "--student", SMALL]
    student = trained(["reflow", models["plain"], *words], tmp_path / "a")
    ((coupling, choices),) = seen
    assert isinstance(coupling, PairSymmetry)
    assert choices.times == Uniform(0.1, 0.9)
    assert choices.premetric == Weighted(PseudoHuber(), "clipped")
    assert choices.steps == 3
    assert student.net.config["width"] == 8
    expected = {"times": "uniform:0.1:0.9", "loss_weight": "clipped", "hflip": True}
    assert expected.items() <= student.lineage[-1].items()
    assert "guidance" not in student.lineage[-1]


def test_guidance_of_live_and_of_stored_pairs(models, tmp_path, capsys):
    guided = [models["labelled"], "--guidance", "2"]
    student = trained(["reflow", *guided, "--condition-dropout", "0.1"], tmp_path / "live")
    assert student.lineage[-1]["guidance"] == 2
    pairs = str(tmp_path / "pairs")
    made = ["--count", "16", "--steps", "2", "--no-check", "--out", pairs]
    assert main(["pairs", *guided, *made]) == 0
    stored = trained(["reflow", *guided, "--pairs", pairs], tmp_path / "stored")
    assert stored.lineage[-1]["guidance"] == 2
    words = "apg:3,norm=2"
    projected = trained(["reflow", models["labelled"], "--guidance", words], tmp_path / "apg")
    assert projected.lineage[-1]["guidance"] == words
    other = ["reflow", models["labelled"], "--guidance", "3", "--pairs", pairs]
    message = fails([*other, "--out", str(tmp_path / "x")], capsys)
    assert "scale=2.0" in message
    assert "scale=3.0" in message
    assert "generate pairs with this --guidance" in message


def test_a_round_says_whether_another_would_help(models, tmp_path, capsys):
    student = trained(["reflow", models["plain"], "--report", "8"], tmp_path / "a")
    found = json.loads((tmp_path / "a/straightening.json").read_text())
    assert (found["before"]["rounds"], found["after"]["rounds"]) == (0, 1)
    assert f"straightening: {found['sentence']}" in capsys.readouterr().out
    assert (tmp_path / "a/straightening-gap.png").stat().st_size > 100
    # The step after the last one: pairs that the training did not see.
    teacher = FlowModel.from_pretrained(models["plain"])
    pairs = LivePairs(teacher, 2).draw(Draw.of(8, step=3))
    expected = profile(student, pairs, steps=20, count=8)
    assert found["after"]["missed"] == pytest.approx(expected.missed, rel=1e-5)
    assert found["after"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    message = fails(["reflow", models["plain"], "--report", "1"], capsys)
    assert "--report needs two pairs or more, or 0 for none, got 1" in message


def test_a_method_may_train_on_the_teachers_data(models, tmp_path, monkeypatch, capsys):
    seen = []

    def build_on_data(teacher, coupling, choices):
        seen.append(coupling)
        return Reflow(teacher, coupling)

    entry = replace(METHODS["reflow"], pairs=False, build=build_on_data)
    monkeypatch.setitem(METHODS, "reflow", entry)
    trained(["reflow", models["plain"]], tmp_path / "a")
    assert isinstance(seen[0], Independent)
    message = fails(["reflow", models["plain"], "--hflip"], capsys)
    assert "reflow trains on data, not on pairs: leave out --pairs/--hflip" in message


def test_settings_of_a_method_from_a_file(tmp_path):
    file = tmp_path / "reflow.toml"
    file.write_text('method = "annealing"\nstudent = "unet-7m"\n[annealing]\nschedule = "linear:9"')
    settings = from_toml(ReflowSettings, file)
    assert (settings.method, settings.student) == ("annealing", "unet-7m")
    assert settings.annealing == AnnealingOptions("linear:9")
    assert (ReflowSettings().method, DistillSettings().method) == ("reflow", "one-step")


@pytest.mark.parametrize("command", ["reflow", "distill"])
def test_help_names_every_method_with_its_flags(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for name, entry in methods_of(command).items():
        assert name in shown
        for option in entry.options.__dataclass_fields__:
            assert f"--{name}.{option.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    "command, teacher, words, message",
    [
        ("reflow", "plain", ["--method", "anealing"], "did you mean 'annealing'"),
        ("distill", "plain", ["--method", "annealing"], "annealing belongs to rectiflow reflow"),
        ("reflow", "plain", ["--method", "annealing"], "trains a student of its own"),
        (
            "reflow",
            "plain",
            ["--annealing.schedule", "linear:2"],
            "settings of annealing were given but the method is reflow: add --method annealing",
        ),
        (
            "reflow",
            "plain",
            ["--method", "annealing", "--student", SMALL, "--annealing.schedule", "linear:9"],
            "annealing ends after 9 steps and the training after 3",
        ),
        ("distill", "plain", ["--times", "uniform"], "looks only at times of its own"),
        ("distill", "plain", ["--loss-weight", "snr"], "--loss-weight has no meaning"),
        ("reflow", "plain", ["--loss-weight", "srn"], "did you mean 'snr'"),
        ("reflow", "plain", ["--times", "unifrom"], "did you mean 'uniform'"),
        ("reflow", "plain", ["--premetric", "l3"], "unknown premetric 'l3'"),
        ("reflow", "plain", ["--student", "unet-8m"], "unknown net 'unet-8m': did you mean"),
        ("reflow", "plain", ["--guidance", "2"], "--guidance needs a model that takes labels"),
        ("reflow", "plain", ["--guidance", "-2"], "guidance must be >= 0"),
        ("distill", "curved", [], "needs a model on the rectified path, got 'vp'"),
        (
            "distill",
            "curved",
            ["--method", "flow-guided", "--student", SMALL],
            "needs teacher and student on one path, got 'vp' and 'rectified'",
        ),
        (
            "distill",
            "plain",
            ["--method", "flow-guided", "--flow-guided.first-step", "both"],
            "unknown first step 'both'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    models, command, teacher, words, message, tmp_path, capsys
):
    out = tmp_path / "run"
    shown = fails([command, models[teacher], *words, *SHORT, "--out", str(out)], capsys)
    assert message in shown
    assert not out.exists()
