"""`rectiflow invert` and `rectiflow edit`: what they write, that they say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.interop.pipelines import SIZE, shared
from tests.stirring import stirred

from rectiflow.cli import main
from rectiflow.flows import FlowModel
from rectiflow.guidance import edit_region
from rectiflow.images import RFEdit, round_trip
from rectiflow.nets import MMDiT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional model, an unconditional one, a pipeline, and pictures for them."""
    root = tmp_path_factory.mktemp("inversion")
    for name, classes in (("model", 4), ("plain", 0)):
        net = MMDiT(shape=(1, 8, 8), depth=2, heads=2, head_dim=8, classes=classes)
        FlowModel(stirred(net), shape=(1, 8, 8)).save_pretrained(root / name)
    shared("sd3").save_pretrained(root / "pipe")
    generator = np.random.default_rng(0)
    for name, shape in (
        ("a", (8, 8)),
        ("b", (8, 8)),
        ("wide", (8, 12)),
        ("colour", (8, 8, 3)),
        ("photo", (*SIZE, 3)),
    ):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECTIFLOW_CACHE", str(tmp_path / "cache"))


def pixels(*files: Path) -> torch.Tensor:
    arrays = [np.asarray(Image.open(file), dtype=np.float32) for file in files]
    return torch.from_numpy(np.stack(arrays)[:, None] / 127.5 - 1)


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    lines = [one for one in capsys.readouterr().err.splitlines() if one]
    # diffusers and transformers draw bars while they read a pipeline.
    said = [place for place, one in enumerate(lines) if one.startswith(f"rectiflow {words[0]}: ")]
    assert said == [len(lines) - 1]
    return lines[-1]


def test_invert_writes_noises_picture_and_numbers(folder: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "back.png", (folder / "a.png", folder / "b.png")
    words = ["--label", "2", "--steps", "4", "--batch-size", "1", "--out", str(out)]
    assert main(["invert", str(folder / "model"), *map(str, files), *words]) == 0
    model, x = FlowModel.from_pretrained(folder / "model").eval(), pixels(*files)
    expected = round_trip(model, x, steps=4, label=torch.tensor([2, 2]))
    noise = torch.from_numpy(np.load(out.with_suffix(".npy")))
    torch.testing.assert_close(noise, expected.noise, rtol=1e-4, atol=1e-5)
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["round_trip_error"] == pytest.approx(expected.error.tolist(), abs=2e-6)
    assert found["settings"]["solver"] == "rf-solver"
    assert found["times"] == [0, 0.25, 0.5, 0.75, 1]
    # Two rows of an image and its reconstruction, each pixel eight times as large.
    assert Image.open(out).size == (17 * 8, 17 * 8)


def test_edit_writes_before_after_and_numbers(folder: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "edit.png", (folder / "a.png", folder / "b.png")
    words = ["--label", "0", "1", "3", "--steps", "3", "--inject", "2", "--out", str(out)]
    assert main(["edit", str(folder / "model"), *map(str, files), *words]) == 0
    model, x = FlowModel.from_pretrained(folder / "model").eval(), pixels(*files)
    expected = RFEdit(model, steps=3, inject=2)(
        x, source={"label": torch.tensor([0, 0])}, target={"label": torch.tensor([1, 3, 1, 3])}
    )
    found = json.loads(out.with_suffix(".json").read_text())
    gaps = expected.images.unflatten(0, (2, 2)).clamp(-1, 1) - x[:, None]
    away = gaps.square().flatten(2).mean(2).sqrt().T
    np.testing.assert_allclose(found["distance"], away, atol=2e-6)
    assert found["bank_bytes"] == expected.bytes
    assert found["columns"] == ["image", "reconstruction", 1, 3]
    assert found["blocks"] == ["blocks.1"]
    assert Image.open(out).size == (35 * 8, 17 * 8)


def test_a_region_is_edited_and_the_rest_kept(folder: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "keep.png")
    out, files = tmp_path / "edit.png", (folder / "a.png", folder / "b.png")
    words = ["--label", "0", "1", "3", "--mask", str(tmp_path / "keep.png"), "--steps", "20"]
    words += ["--source-steps", "0", "--step-size", "0.2", "--out", str(out), "--batch-size", "1"]
    assert main(["edit", str(folder / "model"), *map(str, files), *words]) == 0
    model, x = FlowModel.from_pretrained(folder / "model").eval(), pixels(*files)
    generator = torch.Generator().manual_seed(0)
    expected = edit_region(
        model,
        x,
        torch.from_numpy(mask / 255).float()[None],
        condition={"label": torch.tensor([3, 3])},
        source={"label": torch.tensor([0, 0])},
        source_steps=0,
        steps=20,
        step_size=0.2,
        noise=torch.randn(2, 1, 8, 8, generator=generator),
    )
    found = json.loads(out.with_suffix(".json").read_text())
    away = (expected.clamp(-1, 1) - x).square().flatten(1).mean(1).sqrt()
    np.testing.assert_allclose(found["distance"][1], away, atol=2e-6)
    assert found["columns"] == ["image", 1, 3]
    whole = np.asarray(found["distance"])
    assert (np.asarray(found["kept_error"]) < 0.7 * whole).all()
    assert Image.open(out).size == (26 * 8, 17 * 8)


def test_a_pipeline_is_edited_by_prompts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit.png"
    words = ["--prompt", "a fox", "a door", "--steps", "2", "--inject", "1", "--out", str(out)]
    assert main(["edit", str(folder / "pipe"), str(folder / "photo.png"), *words]) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["columns"] == ["image", "reconstruction", "a door"]
    # Equal steps under the shift of 3 of the pipeline's scheduler.
    assert found["times"] == [0, 0.25, 1]
    assert found["distance"][0][0] > 0
    Image.fromarray(np.triu(np.full(SIZE, 255, np.uint8), 8)).save(tmp_path / "keep.png")
    words += ["--mask", str(tmp_path / "keep.png"), "--overwrite"]
    assert main(["edit", str(folder / "pipe"), str(folder / "photo.png"), *words]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["columns"] == ["image", "a door"]
    inverted = tmp_path / "back.png"
    words = ["--prompt", "a fox", "--steps", "2", "--out", str(inverted)]
    assert main(["invert", str(folder / "pipe"), str(folder / "photo.png"), *words]) == 0
    assert np.load(inverted.with_suffix(".npy")).shape == (1, 4, 8, 8)


def test_long_prompts_are_said_and_cut_on_request(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "pipe"), str(folder / "photo.png"), "--steps", "1", "--inject", "0"]
    words += ["--out", str(tmp_path / "edit.png"), "--prompt", "a fox", "a fox jumping over a dog"]
    message = fails(["edit", *words], capsys)
    assert "tokenizer of StableDiffusion3Pipeline takes 16" in message
    assert "--truncate" in message
    assert main(["edit", *words, "--truncate"]) == 0


def test_nothing_is_overwritten_silently(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "back.png"
    words = ["invert", str(folder / "model"), str(folder / "a.png"), "--steps", "1"]
    words += ["--out", str(out)]
    assert main(words) == 0
    out.unlink()
    assert "back.json exists: choose another --out or pass --overwrite" in fails(words, capsys)
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    "image, message",
    [
        ("wide.png", "it has 12x8 pixels but the model takes 8x8: pass --fit"),
        ("colour.png", "it is coloured but the model takes grey images: pass --fit"),
        ("none.png", "none.png does not exist"),
        (".", "is a folder: name the images in it"),
        ("text.png", "text.png cannot be used: not an image"),
        ("loud.npy", "floats must be in [-1, 1]"),
        ("tall.npy", "holds images of shape (1, 9, 8)"),
    ],
)
def test_wrong_images(
    folder: Path, capsys: pytest.CaptureFixture[str], image: str, message: str
) -> None:
    (folder / "text.png").write_text("no picture")
    np.save(folder / "loud.npy", np.full((1, 1, 8, 8), 3.0, dtype=np.float32))
    np.save(folder / "tall.npy", np.zeros((1, 1, 9, 8), dtype=np.float32))
    out = ["--out", str(folder / "never.png")]
    shown = fails(["invert", str(folder / "model"), str(folder / image), *out], capsys)
    assert message in shown
    assert not (folder / "never.png").exists()


def test_fit_makes_images_of_any_kind_usable(folder: Path, tmp_path: Path) -> None:
    images = [str(folder / "wide.png"), str(folder / "colour.png")]
    words = ["--fit", "--steps", "1", "--out", str(tmp_path / "back.png")]
    assert main(["invert", str(folder / "model"), *images, *words]) == 0
    assert np.load(tmp_path / "back.npy").shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "words, message",
    [
        (["edit", "model", "--label", "1"], "--label needs what the images show and what is want"),
        (["edit", "model"], "say what the images show and what is wanted"),
        (["edit", "model", "--label", "0", "9"], "--label must be in 0 to 3, got 9"),
        (["edit", "plain", "--label", "0", "1"], "the model takes no labels"),
        (["edit", "model", "--prompt", "a", "b"], "the model takes class labels"),
        (["edit", "model", "--label", "0", "1", "--guidance", "-1"], "guidance must be >= 0"),
        (["edit", "model", "--label", "0", "1", "--guidance", "nan"], "guidance must be >= 0"),
        (["edit", "model", "--label", "0", "1", "--guidance", "inf"], "guidance must be finite"),
        (["edit", "model", "--label", "0", "1", "--inject", "99"], "inject must be from 0 to the"),
        (["edit", "model", "--label", "0", "1", "--blocks", "x"], "selects no attention"),
        (["edit", "model", "--label", "0", "1", "--solver", "sde"], "same evaluations in both"),
        (["invert", "model", "--solver", "rf-solver:0"], "theta must be in (0, 1]"),
        (["invert", "model", "--steps", "0"], "steps must be > 0"),
        (["invert", "model", "--out", "x.gif"], "--out must be a .png"),
        (["invert", "nowhere"], "nowhere"),
    ],
)
def test_wrong_settings(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert message in fails([*words[:2], "a.png", *words[2:]], capsys)
