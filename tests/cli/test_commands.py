"""Every command on a tiny model, in process: what it writes, prints and refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.cli import main
from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.settings import from_toml
from rectiflow.cli.train import Settings as TrainSettings
from rectiflow.flows import FlowModel, integrate
from rectiflow.guidance import APG, ClassifierFreeGuidance
from rectiflow.interop.export import run_program
from rectiflow.nets import build
from rectiflow.training.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """train, pairs, reflow and distill on digits, a few steps each."""
    folder = tmp_path_factory.mktemp("chain")
    small = ["--steps", "3", "--batch-size", "8", "--log-every", "1"]
    assert main(["train", "--net", "mlp-2d", *small, "--out", str(folder / "flow")]) == 0
    model = str(folder / "flow/model")
    pairs = ["--out", str(folder / "pairs"), "--count", "32", "--steps", "4", "--shard-size", "16"]
    assert main(["pairs", model, *pairs, "--no-check"]) == 0
    teacher = [model, "--pairs", str(folder / "pairs"), *small]
    assert main(["reflow", *teacher, "--out", str(folder / "reflow")]) == 0
    straight = str(folder / "reflow/model")
    assert (
        main(["distill", straight, *small, "--teacher-steps", "2", "--out", str(folder / "one")])
        == 0
    )
    return folder


def fails(words: list[str], capsys) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("rectiflow ")
    assert "\n" not in shown
    return shown


def test_chain_leaves_models_with_lineage(chain):
    one = FlowModel.from_pretrained(chain / "one/model")
    assert [entry["method"] for entry in one.lineage] == ["flow", "reflow", "distil"]
    assert one.sampling == {"solver": "euler", "steps": 1, "made_for": 1}
    assert one.data["spec"] == "digits"
    record = json.loads((chain / "one/run.json").read_text())
    assert record["status"] == "done"
    assert record["settings"]["teacher_steps"] == 2
    assert record["systems"] == ["rectified-flow"]


def test_sample_writes_sheet_array_and_folder(chain, tmp_path, capsys):
    model = str(chain / "one/model")
    for name in ("a.npy", "b.png", "c"):
        assert main(["sample", model, "--count", "4", "--out", str(tmp_path / name)]) == 0
    array = np.load(tmp_path / "a.npy")
    assert array.shape == (4, 1, 8, 8)
    assert Image.open(tmp_path / "b.png").size == (17 * 8, 17 * 8)
    assert len(list((tmp_path / "c").iterdir())) == 4
    message = fails(["sample", model, "--out", str(tmp_path / "b.png")], capsys)
    assert "exists: choose another --out or pass --overwrite" in message


def test_overwriting_a_folder_of_samples_spares_the_rest(chain, tmp_path, capsys):
    words = ["sample", str(chain / "one/model"), "--out", str(tmp_path / "c"), "--count"]
    assert main([*words, "4"]) == 0
    (tmp_path / "c/notes.txt").write_text("mine")
    (tmp_path / "c/cat.png").write_text("mine")
    assert main([*words, "2", "--overwrite"]) == 0
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["000000.png", "000001.png", "cat.png", "notes.txt"]
    (tmp_path / "file").write_text("mine")
    words = ["sample", str(chain / "one/model"), "--out", str(tmp_path / "file"), "--overwrite"]
    assert "is a file: choose another --out" in fails(words, capsys)


def test_sample_is_reproducible(chain, tmp_path):
    model = str(chain / "flow/model")
    for name in ("a.npy", "b.npy"):
        words = ["--count", "5", "--steps", "2", "--seed", "3", "--batch-size", "2"]
        main(["sample", model, *words, "--out", str(tmp_path / name)])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_sample_under_guidance(tmp_path, capsys):
    """The words on the command line and the field in Python give the same images."""
    net = build("mlp", shape=(1, 8, 8), width=16, depth=1, classes=10, zero=False)
    model = FlowModel(net, shape=(1, 8, 8))
    folder = str(model.save_pretrained(tmp_path / "model"))
    words = ["sample", folder, "--count", "4", "--steps", "3", "--label", "2", "--guidance"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 1, 8, 8, generator=generator)
    fields = {
        "3": ClassifierFreeGuidance(model, 3.0),
        "cfg:3,stop=0.5,negative=1": ClassifierFreeGuidance(
            model, 3.0, stop=0.5, negative={"label": 1}
        ),
        "apg:7.5,eta=0,momentum=-0.5,norm=2": APG(model, 7.5, norm=2.0),
    }
    for index, (said, field) in enumerate(fields.items()):
        out = tmp_path / f"{index}.npy"
        assert main([*words, said, "--out", str(out)]) == 0
        with torch.no_grad():
            wanted = integrate(field, noise, 3, label=torch.full((4,), 2))
        np.testing.assert_allclose(np.load(out), wanted, rtol=1e-4, atol=1e-5)
    for said, message in (
        ("agp:4", "did you mean 'apg'"),
        ("apg:4,eta=2", "eta must be in [0, 1]"),
        ("cfg:4,negative=10", "must be a label from 0 to 9, got 10"),
        ("-1", "guidance must be >= 0"),
    ):
        assert message in fails([*words, said, "--out", str(tmp_path / "x.npy")], capsys)


def test_guidance_of_a_model_without_labels_is_refused(chain, tmp_path, capsys):
    words = ["sample", str(chain / "flow/model"), "--guidance", "apg:4"]
    message = fails([*words, "--out", str(tmp_path / "x.npy")], capsys)
    assert "--guidance needs a model that takes labels" in message


def test_info_tells_model_and_lineage(chain, capsys):
    assert main(["info", str(chain / "one/model")]) == 0
    shown = capsys.readouterr().out
    assert "3. distil" in shown
    assert main(["info", str(chain / "one/model"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["network"] == "mlp"
    assert facts["shape"] == [1, 8, 8]


def test_evaluate_scores_against_the_models_data(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RECTIFLOW_CACHE", str(tmp_path / "cache"))
    words = ["--steps", "1", "2", "--samples", "64", "--features", "random"]
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(chain / "flow/model"), *words, "--out", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert set(scores["scores"]) == {"1", "2"}
    assert scores["floor"]["fd"] < scores["scores"]["1"]["fd"]
    assert scores["floor"]["fd_pixels"] < scores["scores"]["1"]["fd_pixels"]
    assert "floor" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_gives_the_models_samples(chain, tmp_path, capsys, suffix):
    out = tmp_path / f"sampler{suffix}"
    assert main(["export", str(chain / "one/model"), "--out", str(out), "--steps", "2"]) == 0
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = FlowModel.from_pretrained(chain / "one/model")
    with torch.no_grad():
        halfway = noise + 0.5 * model(noise, torch.zeros(5))
        expected = halfway + 0.5 * model(halfway, torch.full((5,), 0.5))
    torch.testing.assert_close(run_program(out, noise=noise), expected, rtol=1e-4, atol=1e-5)


def test_export_follows_the_models_own_solver(chain, tmp_path, capsys):
    model = FlowModel.from_pretrained(chain / "flow/model")
    out = tmp_path / "sampler.pt2"
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model.sampling = {"solver": "heun", "steps": 2}
    model.save_pretrained(tmp_path / "heun")
    assert main(["export", str(tmp_path / "heun"), "--out", str(out)]) == 0
    with torch.no_grad():
        expected = integrate(model, noise, 2, "heun")
    torch.testing.assert_close(run_program(out, noise=noise), expected, rtol=1e-4, atol=1e-5)
    model.sampling = {"solver": "renoise", "steps": 2}
    model.save_pretrained(tmp_path / "renoise")
    words = ["export", str(tmp_path / "renoise"), "--out", str(tmp_path / "b.pt2")]
    message = fails(words, capsys)
    assert "only fixed-step solvers can be exported, got 'renoise': choose euler" in message


def test_cite_names_the_papers_used(chain, capsys):
    assert main(["cite", str(chain / "one")]) == 0
    assert "2209.03003" in capsys.readouterr().out
    assert main(["cite", str(chain / "one/model")]) == 0
    assert "2209.03003" in capsys.readouterr().out


def test_runs_are_not_overwritten(chain, capsys):
    message = fails(["train", "--steps", "3", "--out", str(chain / "flow")], capsys)
    assert "is not empty" in message
    assert "--resume" in message


def test_resume_of_a_finished_run_keeps_its_model(chain, capsys):
    before = (chain / "flow/model/model.safetensors").read_bytes()
    words = ["--net", "mlp-2d", "--steps", "3", "--batch-size", "8", "--resume"]
    assert main(["train", *words, "--out", str(chain / "flow")]) == 0
    assert (chain / "flow/model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--net", "mlp"], "--net was mlp-2d, now mlp"),
        (["--data", "photos", "--size", "8"], "--data was digits, now photos"),
        (["--optim.name", "sgd"], "--optim.name was adam, now sgd"),
        (["--steps", "5"], "is done, with --steps 3: for 5 start a new run"),
    ],
)
def test_resume_with_other_settings_is_refused(chain, capsys, words, message):
    before = (chain / "flow/run.json").read_bytes()
    own = ["--net", "mlp-2d", "--steps", "3", "--batch-size", "8", "--out", str(chain / "flow")]
    assert message in fails(["train", *own, *words, "--resume"], capsys)
    assert (chain / "flow/run.json").read_bytes() == before


def test_a_corrected_command_takes_the_folder_of_a_refused_one(tmp_path, capsys):
    words = ["train", "--net", "mlp-2d", "--steps", "2", "--batch-size", "8"]
    words += ["--out", str(tmp_path / "run")]
    assert main([*words, "--tract", "--tract-layer", "bodi"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[0] == f"run folder: {tmp_path / 'run'}"
    assert "unknown layer 'bodi'" in shown[1]
    assert main(words) == 0


def test_an_interrupt_ends_with_status_130_and_a_resume_goes_on(tmp_path):
    words = ["train", "--net", "mlp-2d", "--batch-size", "8", "--checkpoint-every", "1000000"]
    words += ["--log-every", "1", "--steps", "1000000", "--out", str(tmp_path / "run")]
    # A job in the background of a shell inherits that interrupts are ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from rectiflow.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 130, shown
    last = re.findall(r"rectiflow: interrupted \(stopped at step (\d+)\)", shown)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"
    assert [step for step, _ in list_checkpoints(tmp_path / "run/checkpoints")] == [int(last[0])]
    words[words.index("--steps") + 1] = str(int(last[0]) + 2)
    assert main([*words, "--resume"]) == 0
    lineage = FlowModel.from_pretrained(tmp_path / "run/model").lineage
    assert lineage[-1]["steps"] == int(last[0]) + 2


def test_skipped_files_are_named_in_a_plain_line(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = np.full((8, 8), 20 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/bad.png").write_text("no picture")
    words = ["train", "--data", f"folder:{tmp_path / 'images'}", "--net", "mlp-2d", "--steps", "1"]
    assert main([*words, "--batch-size", "2", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: skipped 1 in ") for line in shown)
    assert not any("UserWarning" in line for line in shown)


def test_pairs_of_another_model_are_refused(chain, capsys, tmp_path):
    words = [str(chain / "reflow/model"), "--pairs", str(chain / "pairs"), "--steps", "1"]
    message = fails(["reflow", *words, "--out", str(tmp_path / "x")], capsys)
    assert "was made by a teacher with weights" in message


def test_list_and_doctor_as_json(capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 41
    assert rows[0]["slug"] == "rectified-flow"
    assert main(["doctor", "--json"]) == 0
    extras = json.loads(capsys.readouterr().out)["extras"]
    assert extras["app"] == []
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as stream:
        listed = tomllib.load(stream)["project"]["optional-dependencies"]
    assert set(extras) == set(listed) - {"bench", "dev", "docs", "all"}


def test_config_file_gives_the_same_names(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text('data = "photos"\nbatch-size = 7\n[optim]\nname = "sgd"\nlearning_rate = 1\n')
    settings = from_toml(TrainSettings, file)
    assert (settings.data, settings.batch_size, settings.steps) == ("photos", 7, 4000)
    assert settings.optim.name == "sgd"
    assert settings.optim.learning_rate == 1.0


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz = 3", "unknown setting in .*'stepz': did you mean 'steps'"),
        ('steps = "many"', "steps in .* must be int, got 'many'"),
        ("steps = 0", "steps must be > 0, got 0"),
        ("optim = 3", "optim in .* must be a table"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_wrong_config_files(tmp_path, text, message):
    file = tmp_path / "train.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_toml(TrainSettings, file)


def test_flags_win_over_the_file(tmp_path, capsys):
    file = tmp_path / "train.toml"
    file.write_text('net = "mlp-2d"\nsteps = 2\nbatch_size = 4\n')
    words = ["train", "--config", str(file), "--steps", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    stored = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert (stored["steps"], stored["batch_size"], stored["net"]) == (1, 4, "mlp-2d")


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian"], "unknown command 'trian': did you mean 'train'"),
        (["train", "--steps", "0"], "steps must be > 0, got 0"),
        (["train", "--stepz", "3"], "Unrecognized options: --stepz"),
        (["train", "--steps", "many"], "--steps"),
        (["sample"], "Model folder, diffusers pipeline folder"),
        (["train", "--batch-size", "-1"], "batch_size must be > 0, got -1"),
        (["train", "--optim.name", "adamm"], "did you mean 'adam"),
        (["train", "--path", "rectifed"], "did you mean 'rectified'"),
        (["train", "--prediction", "speed"], "unknown prediction 'speed'"),
        (["train", "--net", "unet-xz"], "unknown net 'unet-xz'"),
        (["train", "--coupling", "otter"], "did you mean 'ot'"),
        (["train", "--data", "digit"], "did you mean 'digits'"),
        (["train", "--data", "folder:/no/such/place"], "/no/such/place"),
        (["train", "--resume"], "--resume needs --out"),
        (["sample", "/no/such/model"], "no model folder at /no/such/model"),
        (["sample", "/no/such/model", "--count", "0"], "count must be > 0"),
        (["run", "rectified-flows"], "did you mean 'rectified-flow'"),
        (["run", "difftactile"], "is planned, not built"),
        (["run", "few-step-shootout", "--preset", "fashon"], "did you mean 'fashion'"),
        (["run", "few-step-shootout", "--preset", "x"], "(available: default, fashion, quick)"),
        (["run", "rrnet", "--data", "digits"], "recipe 'rrnet' makes its own data"),
        (["cite", "/no/such/run"], "neither a run nor a model folder"),
        (["list", "--jsn"], "list takes only --json"),
        (["train", "--config", "/no/such.toml"], "no configuration file"),
    ],
)
def test_wrong_use_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(words, capsys)
    assert not list(tmp_path.rglob("checkpoints"))


def test_run_takes_any_preset_and_other_data(tmp_path, monkeypatch):
    from rectiflow.recipes import recipe

    seen = []

    def note(found, settings, run, *, preset):
        seen.append((preset, settings))
        check = recipe.Check("gap", (0.0,), at_most=1)
        return recipe.Result(found.slug, "", [recipe.Number("gap", "", (0.0,))], [check], (0,))

    monkeypatch.setattr(recipe, "run_recipe", note)
    words = ["run", "few-step-shootout", "--out"]
    assert main([*words, str(tmp_path / "a"), "--preset", "fashion"]) == 0
    assert main([*words, str(tmp_path / "b"), "--data", "fashion-mnist"]) == 0
    presets = recipe.load_recipe("few-step-shootout").presets
    assert seen[0] == ("fashion", presets["fashion"])
    assert seen[1] == ("default", replace(presets["default"], data="fashion-mnist"))


def test_wrong_solver_is_one_line(chain, capsys, tmp_path):
    words = ["sample", str(chain / "one/model"), "--solver", "huen"]
    assert "did you mean 'heun'" in fails([*words, "--out", str(tmp_path / "x.png")], capsys)


def test_label_for_a_model_without_classes(chain, capsys, tmp_path):
    words = ["sample", str(chain / "one/model"), "--label", "3", "--out", str(tmp_path / "x.png")]
    assert "takes no labels" in fails(words, capsys)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown command"):
        main(["--debug", "trian"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    if name in ("list", "doctor"):
        assert main([name, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([name, "--help"])
    assert f"rectiflow {name}" in capsys.readouterr().out


def test_conditional_model_from_training_to_samples(tmp_path, capsys):
    words = ["--conditional", "--net", "mlp-2d", "--steps", "2", "--batch-size", "8"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    model = str(tmp_path / "run/model")
    out = ["--count", "3", "--steps", "2", "--out"]
    assert main(["sample", model, "--label", "7", *out, str(tmp_path / "a.npy")]) == 0
    assert main(["sample", model, *out, str(tmp_path / "b.npy")]) == 0
    message = fails(["sample", model, "--label", "12", *out, str(tmp_path / "c.npy")], capsys)
    assert "--label must be in 0 to 9, got 12" in message
    loaded = FlowModel.from_pretrained(model)
    with pytest.raises(ValueError, match="label must be int64"):
        loaded.check(torch.zeros(2, 1, 8, 8), label=torch.zeros(2))
