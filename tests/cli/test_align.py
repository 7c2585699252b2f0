"""`rectiflow align`: files, lineage, resume, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rectiflow.cli import main
from rectiflow.flows import FlowModel
from rectiflow.nets import build

SHORT = ["--steps", "4", "--batch-size", "8", "--pictures", "4", "--sampling-steps", "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, classes in (("plain", 0), ("labelled", 10)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = build("mlp", shape=(1, 8, 8), width=16, depth=1, classes=classes, zero=False)
        data = {"name": "digits", "spec": "digits", "size": None, "channels": None}
        model = FlowModel(net, shape=(1, 8, 8), data=data, lineage=[{"method": "flow"}])
        made[name] = str(model.save_pretrained(folder / name))
    return made


def aligned(words: list[str], out: Path) -> FlowModel:
    assert main(["align", *words, *SHORT, "--out", str(out)]) == 0
    return FlowModel.from_pretrained(out / "model")


def test_files_numbers_and_lineage(models, tmp_path, capsys) -> None:
    words = [models["plain"], "--reward", "brightness", "--optim.learning-rate", "0.05"]
    model = aligned([*words, "--keep-adapters", "--truncation", "full"], tmp_path / "a")
    assert model.net.name == "mlp", "the adapters are merged"
    first, second = model.lineage
    assert first == {"method": "flow"}
    expected = {"method": "alignprop", "truncation": "full", "reward": ["brightness"], "steps": 4}
    assert expected.items() <= second.items()
    assert "**alignprop**" in (tmp_path / "a/model/README.md").read_text()
    record = json.loads((tmp_path / "a/align.json").read_text())
    assert record["after"]["reward"] > record["before"]["reward"]
    assert record["after"]["diversity"] > 0
    assert [row["step"] for row in record["curve"]] == [1, 2, 3, 4]
    for name in ("before.png", "after.png", "rewards.png", "adapters.safetensors"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert (tmp_path / "a/before.png").read_bytes() != (tmp_path / "a/after.png").read_bytes()
    assert json.loads((tmp_path / "a/run.json").read_text())["systems"] == ["alignprop"]
    assert "before" in capsys.readouterr().out


def test_labels_mixture_held_out_reward_and_reinforce(models, tmp_path) -> None:
    words = [models["labelled"], "--reward", "classifier:+1", "0.1*brightness:0"]
    words += ["--guidance", "cfg:2,stop=0.9", "--early-stop-reward", "compressibility"]
    words += ["--early-stop-every", "2", "--drift", "0.01", "--target", "0"]
    model = aligned(words, tmp_path / "a")
    record = json.loads((tmp_path / "a/align.json").read_text())
    assert {"reward", "held-out reward", "diversity"} <= record["after"].keys()
    assert model.lineage[-1]["reward"] == ["classifier:+1", "0.1*brightness:0"]
    words = [models["labelled"], "--method", "reinforce", "--reward", "classifier:3"]
    assert aligned(words, tmp_path / "b").lineage[-1]["method"] == "reinforce"


def test_resume_goes_on(models, tmp_path) -> None:
    words = [models["plain"], "--reward", "brightness", "--checkpoint-every", "2"]
    whole = aligned(words, tmp_path / "a")
    # The state after step 2, as if the run had been killed there.
    aligned(words, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/model")
    (tmp_path / "b/checkpoints/step-00000004.pt").unlink()
    again = aligned([*words, "--resume"], tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--reward", "brightnes"], "did you mean 'brightness'"),
        (["--reward", "classifier:own"], "and the model has none"),
        (["--reward", "classifier:12"], "class must be from 0 to 9, got 12"),
        (["--method", "reinforced"], "did you mean 'reinforce'"),
        (["--method", "reinforce", "--solver", "heun"], "belong to alignprop"),
        (["--truncation", "last:9"], "9 steps cannot carry gradient: the chain has 3"),
        (["--truncation", "lst:9"], "did you mean 'last'"),
        (["--guidance", "3"], "needs a model that takes labels"),
        (["--pictures", "1"], "pictures must be >= 2"),
        (["--drift", "-1"], "drift must be >= 0"),
        (["--reward", "python:no.such"], "no reward at python:no.such"),
    ],
)
def test_errors_are_one_line(models, tmp_path, capsys, words, message) -> None:
    options = [*SHORT, *words, "--out", str(tmp_path / "a")]
    assert main(["align", models["plain"], *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
