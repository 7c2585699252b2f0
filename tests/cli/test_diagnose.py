"""`--diagnose` on commands that train: the same model, a page of plots, honest refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rectiflow.cli import main
from rectiflow.flows import FlowModel

SHORT = ["--steps", "4", "--batch-size", "8", "--log-every", "4", "--ema", "0"]
TRAIN = ["train", "--data", "digits", "--net", "mlp-2d", *SHORT]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "watched"
    words = ["--diagnose", "sharpness,opposing-signals", "--diagnose-every", "2"]
    assert main([*TRAIN, *words, "--out", str(out)]) == 0
    return out


def test_the_model_is_the_same_and_the_page_shows_plots(watched: Path, tmp_path: Path) -> None:
    assert main([*TRAIN, "--out", str(tmp_path / "plain")]) == 0
    one, other = (FlowModel.from_pretrained(p / "model") for p in (watched, tmp_path / "plain"))
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    page = (watched / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    for name in ("sharpness", "opposing-signals"):
        lines = (watched / "diagnose" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4]
    systems = json.loads((watched / "run.json").read_text())["systems"]
    assert systems == ["coordinate-clipping", "opposing-signals", "rectified-flow"]
    assert not (tmp_path / "plain" / "report.html").exists()


def test_students_are_watched_too(watched: Path, tmp_path: Path) -> None:
    words = ["--teacher-steps", "2", "--diagnose", "scale-invariance", *SHORT]
    for command in ("reflow", "distill"):
        out = tmp_path / command
        own = ["--report", "0"] if command == "reflow" else []
        assert main([command, str(watched / "model"), *own, *words, "--out", str(out)]) == 0
        lines = (out / "diagnose" / "scale-invariance.jsonl").read_text().splitlines()
        # A twentieth of four steps is every step.
        assert len(lines) == 4


def test_refusals_come_before_a_run_is_made(watched: Path, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main([*TRAIN, "--diagnose", "sharpnes", *out]) != 0
    assert "did you mean 'sharpness'" in capsys.readouterr().err
    assert main([*TRAIN, "--diagnose", "sharpness", "--diagnose-every", "0", *out]) != 0
    assert "diagnose_every must be > 0" in capsys.readouterr().err
    words = ["--method", "flow-guided", "--diagnose", "sharpness", *SHORT, *out]
    assert main(["distill", str(watched / "model"), *words]) != 0
    assert "FlowGuidedDistillation has no loss of single pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
