"""`rectiflow sds`: what it writes, what it begins with, that it says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.interop.pipelines import shared
from tests.stirring import stirred

from rectiflow.cli import main
from rectiflow.flows import FlowModel
from rectiflow.guidance import ClassifierFreeGuidance
from rectiflow.nets import build
from rectiflow.scenes import ScoreDistillation, paint
from rectiflow.scenes.painting import PAINTING

SHORT = ["--steps", "12", "--every", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without labels, a pipeline, and a picture for each."""
    root = tmp_path_factory.mktemp("sds")
    for name, classes in (("model", 10), ("plain", 0)):
        net = build("mlp", shape=(1, 8, 8), width=16, depth=1, classes=classes)
        FlowModel(stirred(net), shape=(1, 8, 8)).save_pretrained(root / name)
    shared("sd").save_pretrained(root / "pipe")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "small.png")
    return root


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(["sds", *words]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("rectiflow sds: ")
    return shown


def test_pictures_maps_and_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(folder / "model"), "--label", "3", "--count", "2", *SHORT, "--out", str(out)]
    assert main(["sds", *words, "--pixel-clip", "0.02"]) == 0
    assert "2 pictures, " in capsys.readouterr().out
    model = FlowModel.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 1, 8, 8, generator=generator).clamp_(-1, 1)
    expected = paint(
        ScoreDistillation(model, ClassifierFreeGuidance(model, 3.0)),
        start,
        steps=12,
        optim=PAINTING,
        generator=generator,
        label=torch.full((2,), 3),
    )
    found = np.load(out / "samples.npy")
    assert found.shape == (2, 1, 8, 8)
    # The bound changes where it goes.
    assert not np.allclose(found, expected.images, atol=1e-5)
    assert Image.open(out / "samples.png").size == (17 * 8, 17 * 8)
    record = json.loads((out / "result.json").read_text())
    assert record["steps"] == [0, 5, 10, 11]
    assert record["threshold"] == pytest.approx(0.02)
    assert all(size <= 0.02 * (1 + 1e-6) for size in record["largest_after"])
    assert max(record["largest_before"]) > 0.02
    assert all(0 < share <= 1 for share in record["clipped"])
    with Image.open(out / "gradients.png") as maps:
        shown = np.asarray(maps)
    assert shown.max() == 255
    # Once more without the bound, which models of images do not have by default.
    assert main(["sds", *words, "--overwrite"]) == 0
    np.testing.assert_allclose(np.load(out / "samples.npy"), expected.images, atol=1e-5)
    assert json.loads((out / "result.json").read_text())["threshold"] is None


def test_pictures_may_begin_as_images(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [str(folder / "plain"), str(folder / "small.png"), *SHORT, "--out", str(out)]
    assert main(["sds", *words, "--optim.learning-rate", "1e-7"]) == 0
    pixels = np.asarray(Image.open(folder / "small.png"), dtype=np.float32) / 127.5 - 1
    np.testing.assert_allclose(np.load(out / "samples.npy")[0, 0], pixels, atol=1e-5)


def test_pipelines_paint_prompts_through_their_vae(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = ["--prompt", "a red cat", "a blue dog"]
    words = ["sds", str(folder / "pipe"), *prompts, "--steps", "2", "--device", "cpu"]
    assert main([*words, "--negative", "grey", "--out", str(out)]) == 0
    record = json.loads((out / "result.json").read_text())
    # The paper's bound is the default where there is an encoder.
    assert record["threshold"] == pytest.approx(0.1)
    found = np.load(out / "samples.npy")
    assert found.shape[:2] == (2, 3)
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1
    assert main([*words, "--kind", "csd", "--out", str(tmp_path / "csd")]) == 0
    assert not np.array_equal(np.load(tmp_path / "csd/samples.npy"), found)


@pytest.mark.parametrize(
    "words, message",
    [
        (["model", "--label", "10"], "--label must be in 0 to 9, got 10"),
        (["plain", "--label", "1"], "the model takes no labels"),
        (["plain", "--guidance", "3"], "--guidance needs a model that takes labels or prompts"),
        (["plain", "--kind", "csd"], "give a conditional model, or sds"),
        (["model", "--kind", "csd", "--guidance", "3"], "leave out --guidance"),
        (["model", "--kind", "csd", "--negative", "grey"], "and --negative"),
        (["plain", "--pixel-clip", "quantile:2"], "'quantile:Q' with Q in (0, 1)"),
        (["plain", "--suppress", "pixels"], "did you mean 'pixel'"),
        (["plain", "--weight", "sigma"], "unknown weight of score distillation 'sigma'"),
        (["plain", "--times", "0.9", "0.1"], "times must be in [0, 1] and in order"),
        (["plain", "--steps", "0"], "steps must be > 0, got 0"),
        (["plain", "missing.png"], "the image missing.png does not exist"),
        (["plain", "--optim.name", "sophiag"], "needs a network's outputs"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert message in fails([str(folder / words[0]), *words[1:], *out], capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    message = fails([str(folder / "plain"), "--out", str(tmp_path / "out")], capsys)
    assert "exists: choose another --out or pass --overwrite" in message
