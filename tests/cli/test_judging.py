"""Models of latents under `evaluate`, `compare` and `grid`: decoded, prompted, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.interop.pipelines import PROMPTS, shared

from rectiflow.cli import main
from rectiflow.cli.options import load_data
from rectiflow.flows import ClassifierFreeGuidance, FlowModel, sample
from rectiflow.interop.diffusers import decode_latents, encode_prompts, from_pipeline, with_prompts
from rectiflow.nets import build
from rectiflow.training.evaluation import Evaluator

COUNT = 24
FEW = ["--samples", str(COUNT), "--features", "random", "--device", "cpu"]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """A pipeline, a model made from it, images with captions and without, a file of prompts."""
    folder = tmp_path_factory.mktemp("judging")
    shared("sd").save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    generator = np.random.default_rng(0)
    for name in ("captioned", "plain"):
        (folder / name).mkdir()
        for index in range(40):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    rows = [f"{index:02}.png,{'fox' if index % 2 else 'door'} {index}" for index in range(40)]
    (folder / "captioned" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECTIFLOW_CACHE", str(folder / "cache"))
        words = ["distill", str(folder / "pipe"), "--prompts", str(folder / "prompts.txt")]
        words += ["--init", "reinterpret", "--teacher-steps", "1", "--steps", "2"]
        words += ["--batch-size", "4", "--out"]
        assert main([*words, str(folder / "run")]) == 0
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def _cache(given, monkeypatch) -> None:
    monkeypatch.setenv("RECTIFLOW_CACHE", str(given["cache"]))


def data(given, name: str = "captioned") -> list[str]:
    return ["--data", f"folder:{given[name]}"]


def test_scores_are_those_of_decoded_images(given, tmp_path) -> None:
    words = ["evaluate", str(given["pipe"]), *data(given, "plain"), "--steps", "2", *FEW]
    words += ["--prompts", str(given["prompts"]), "--guidance", "3"]
    assert main([*words, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    spec = f"folder:{given['plain']}"
    train, test = (load_data(spec, split=split, size=16, channels=3) for split in ("train", "test"))
    evaluator = Evaluator(train, test, count=COUNT, features="random")
    model = from_pipeline(shared("sd"))
    source, _ = evaluator.noises(model)
    model = with_prompts(model, encode_prompts(shared("sd"), PROMPTS, cache=None))
    made = sample(
        model,
        source=source,
        steps=2,
        solver="euler",
        field=ClassifierFreeGuidance(model, 3.0),
        prompt=torch.arange(COUNT) % 2,
    )
    expected = evaluator.compare(decode_latents(shared("sd"), made).detach())
    assert found["scores"]["2"]["fd"] == pytest.approx(expected.fd, rel=1e-4)
    assert found["scores"]["2"]["fd_pixels"] == pytest.approx(expected.fd_pixels, rel=1e-4)
    assert found["guidance"] == 3


def test_captions_are_the_prompts_by_default(given, tmp_path) -> None:
    words = ["evaluate", str(given["run"] / "model"), *data(given), "--steps", "1", *FEW]
    assert main([*words, "--out", str(tmp_path / "a.json")]) == 0
    other = ["--prompts", str(given["prompts"])]
    assert main([*words, *other, "--out", str(tmp_path / "b.json")]) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert one["floor"] == two["floor"]
    assert one["scores"]["1"]["fd"] != two["scores"]["1"]["fd"]


def test_a_pipeline_beside_its_student(given, tmp_path) -> None:
    words = ["compare", str(given["pipe"]), str(given["run"]), *data(given), "--steps", "1", "2"]
    assert main([*words, *FEW, "--out", str(tmp_path / "page")]) == 0
    found = json.loads((tmp_path / "page" / "compare.json").read_text())
    assert [one["title"] for one in found["models"]] == ["pipe", "run"]
    assert all(one["scores"]["1"]["fd"] > 0 for one in found["models"])
    # Sheets hold images of 16 pixels a side and not latents of 8.
    with Image.open(tmp_path / "page" / "samples.png") as sheet:
        assert min(sheet.size) > 8 * 16


def test_a_grid_of_a_pipeline_keeps_no_prompts(given, tmp_path) -> None:
    words = ["grid", str(given["pipe"]), *data(given), "--measured", "4", "--steps", "3", *FEW]
    assert main([*words, "--against", "2", "--out", str(tmp_path / "scored")]) == 0
    scores = json.loads((tmp_path / "scored" / "grid.json").read_text())
    assert scores["equal"]["2"] > 0
    words = ["grid", str(given["pipe"]), "--prompts", str(given["prompts"]), "--measured", "4"]
    words += ["--steps", "3", "--device", "cpu"]
    assert main([*words, "--against", "--out", str(tmp_path / "plain")]) == 0
    for name in ("scored", "plain"):
        model = FlowModel.from_pretrained(tmp_path / name / "model")
        assert len(model.sampling["steps"]) == 4
        assert [entry["method"] for entry in model.lineage] == ["pipeline", "fitted grid"]


def test_what_is_missing_or_too_much_is_said(given, tmp_path, capsys) -> None:
    pipe, prompts = str(given["pipe"]), ["--prompts", str(given["prompts"])]
    for words, message in [
        (["evaluate", pipe, *prompts], "name some by --data"),
        (["evaluate", pipe, *data(given, "plain")], "has no captions: give --prompts FILE"),
        (["compare", pipe, pipe, *prompts], "name some by --data"),
        (["grid", pipe, *data(given, "plain")], "has no captions: give --prompts FILE"),
    ]:
        capsys.readouterr()
        assert main([*words, *FEW]) == 2
        assert message in capsys.readouterr().err
    net = build("mlp", shape=(1, 8, 8), width=16, depth=1)
    FlowModel(net, shape=(1, 8, 8), data={"spec": "digits"}).save_pretrained(tmp_path / "digits")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "digits"), *prompts, *FEW]) == 2
    assert "--prompts was given, and the model takes none" in capsys.readouterr().err
