"""`rectiflow grid` on a tiny model: the grid it keeps, the scores it shows, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rectiflow.cli import main
from rectiflow.flows import FlowModel, adaptive_times
from rectiflow.flows.sampling import draw_source
from rectiflow.nets import build

DIGITS = {"name": "digits", "spec": "digits", "size": 8, "channels": 1}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of random weights, whose field bends."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(1, 8, 8), width=16, depth=1, zero=False)
    lineage = [{"method": "flow", "steps": 3}]
    FlowModel(net, shape=(1, 8, 8), data=DIGITS, lineage=lineage).save_pretrained(tmp_path / "flow")
    return tmp_path


def test_fitted_times_are_kept_with_the_model(folder):
    out = folder / "out"
    words = [str(folder / "flow"), "--steps", "3", "--measured", "20", "--against"]
    assert main(["grid", *words, "--out", str(out)]) == 0
    given, made = (FlowModel.from_pretrained(f) for f in (folder / "flow", out / "model"))
    source = draw_source(given, 20, generator=torch.Generator().manual_seed(0))
    assert made.sampling == {"solver": "euler", "steps": adaptive_times(given, 3, source=source)}
    assert [entry["method"] for entry in made.lineage] == ["flow", "fitted grid"]
    for name, weight in given.state_dict().items():
        assert torch.equal(weight, made.state_dict()[name])
    assert not (out / "grid.png").exists()


def test_scores_of_equal_and_fitted_grids(folder, capsys, monkeypatch):
    monkeypatch.setenv("RECTIFLOW_CACHE", str(folder / "cache"))
    out = folder / "out"
    words = ["--against", "2", "4", "--samples", "60", "--features", "random", "--out", str(out)]
    assert main(["grid", str(folder / "flow"), *words]) == 0
    found = json.loads((out / "grid.json").read_text())
    assert list(found["times"]) == ["2", "4", "8"]
    assert found["distance"] == "fd_random_digits"
    for scores in (found["equal"], found["fitted"]):
        assert list(scores) == ["2", "4"]
        assert all(value > 0 for value in scores.values())
    assert found["fitted"]["2"] != found["equal"]["2"]
    assert (out / "grid.png").stat().st_size > 1000
    assert "equal steps  fitted grid" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "0"], "steps must be > 0, got 0"),
        (["--against", "-1"], "steps must be > 0, got -1"),
        (["--out", "."], "is not empty"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    given = words if "--against" in words else [*words, "--against"]
    assert main(["grid", "flow", *given]) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown
    assert "\n" not in shown


def test_a_distilled_model_keeps_its_times(folder, capsys):
    model = FlowModel.from_pretrained(folder / "flow")
    model.sampling = {"solver": "euler", "steps": 1, "made_for": 1}
    model.save_pretrained(folder / "one")
    assert main(["grid", str(folder / "one"), "--against", "--out", str(folder / "out")]) == 2
    assert "was distilled to 1 step(s) at times of its own" in capsys.readouterr().err
