"""`--tract` and `--batch-size auto` on the commands that train."""

from __future__ import annotations

import json

import pytest

from rectiflow.cli import main
from rectiflow.cli.settings import from_toml, parse
from rectiflow.cli.train import Settings
from rectiflow.flows import FlowModel
from rectiflow.training.records import read_log

GROWING = ["--batch-size", "auto", "--growth.first", "8", "--growth.interval", "1"]
SHORT = ["--steps", "3", "--log-every", "1"]


@pytest.mark.parametrize(
    "words, lam",
    [
        ([], None),
        (["--tract"], 0.1),
        (["--tract", "--steps", "5"], 0.1),
        (["--tract", "0.05", "--steps", "5"], 0.05),
    ],
)
def test_damping_may_be_left_out(words, lam):
    settings = parse(Settings, words, command="train", summary="")
    assert settings.tract == lam
    assert settings.steps == (5 if "--steps" in words else 4000)


def test_same_names_in_a_file(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text('batch-size = "auto"\ntract = 0.2\n[growth]\neta = 1\n')
    settings = from_toml(Settings, file)
    assert (settings.batch_size, settings.tract, settings.growth.eta) == ("auto", 0.2, 1.0)
    file.write_text('batch-size = "often"\n')
    with pytest.raises(ValueError, match="batch-size"):
        from_toml(Settings, file)


def test_flags_complete_a_file_before_it_is_checked(tmp_path):
    file = tmp_path / "train.toml"
    words = ["--config", str(file)]
    file.write_text("[growth]\neta = 1\n")
    settings = parse(Settings, [*words, "--batch-size", "auto"], command="train", summary="")
    assert (settings.batch_size, settings.growth.eta, settings.steps) == ("auto", 1.0, 4000)
    with pytest.raises(ValueError, match="add --batch-size auto"):
        parse(Settings, words, command="train", summary="")
    file.write_text("steps = 0\n[optim]\nclip_coordinates = 2\n")
    with pytest.raises(ValueError, match=r"steps must be > 0|clip_coordinates must be in"):
        parse(Settings, words, command="train", summary="")
    with pytest.raises(ValueError, match="clip_coordinates must be in"):
        parse(Settings, [*words, "--steps", "3"], command="train", summary="")
    words += ["--steps", "3", "--optim.clip-coordinates", "0.5"]
    settings = parse(Settings, words, command="train", summary="")
    assert (settings.steps, settings.optim.clip_coordinates) == (3, 0.5)


def test_all_trainings_take_both(tmp_path, capsys):
    flow = str(tmp_path / "flow")
    words = ["--net", "mlp-2d", *SHORT, *GROWING, "--growth.eta", "0.01", "--out", flow]
    assert main(["train", *words, "--diagnose", "scale-invariance", "--tract"]) == 0
    entry = FlowModel.from_pretrained(f"{flow}/model").lineage[-1]
    assert entry["tract"] == 0.1
    assert entry["systems"] == ["rectified-flow", "adadagrad", "tract"]
    assert entry["batch_size"] > 8
    rows = read_log(tmp_path / "flow/metrics.jsonl")
    assert rows[0]["batch_size"] > 8
    assert rows[0]["signal_to_noise"] > 0
    teacher = [f"{flow}/model", "--teacher-steps", "2", *SHORT, *GROWING, "--tract", "0.2"]
    for command, more in (("reflow", ["--report", "0"]), ("distill", [])):
        out = tmp_path / command
        assert main([command, *teacher, *more, "--out", str(out)]) == 0
        assert FlowModel.from_pretrained(out / "model").lineage[-1]["tract"] == 0.2
        assert {"tract", "adadagrad"} <= set(json.loads((out / "run.json").read_text())["systems"])
    capsys.readouterr()
    assert main(["train", "--growth.eta", "0.1"]) == 2
    assert "add --batch-size auto" in capsys.readouterr().err
