"""`rectiflow inverse` and `rectiflow sample --steer` on a tiny model and a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.interop.pipelines import shared

from rectiflow.cli import main
from rectiflow.cli.inverse_tasks import cost_of
from rectiflow.images.degradations import Mask

SHORT = ["--steps", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A flow of digits trained for a moment, pictures and masks."""
    folder = tmp_path_factory.mktemp("inverse")
    words = ["train", "--net", "mlp-2d", "--steps", "3", "--batch-size", "8", "--log-every", "1"]
    assert main([*words, "--out", str(folder / "run")]) == 0
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey[:4, :4]).save(folder / "small.png")
    Image.fromarray(np.stack([grey, grey.T, grey[::-1]], 2)).save(folder / "colour.png")
    np.save(folder / "far.npy", np.full((1, 1, 8, 8), 3.0, np.float32))
    keep = np.full((8, 8), 255, np.uint8)
    keep[2:5, 2:5] = 0
    for name, mask in {
        "keep": keep, "wide": keep.repeat(2, 0), "none": 0 * keep, "all": 0 * keep + 255
    }.items():  # fmt: skip
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


def inverse(folder: Path, *words: str, out: str) -> dict:
    model = [str(folder / "run/model"), *SHORT, "--out", str(folder / out)]
    assert main(["inverse", *model, *words]) == 0
    return json.loads((folder / out / "result.json").read_text())


def fails(words: list[str], capsys) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    return shown[0]


@pytest.mark.parametrize("task", ["inpaint", "sr", "deblur"])
def test_held_out_images_by_default(folder, task):
    found = inverse(folder, "--task", task, "--count", "3", out=f"held-{task}")
    assert found["images"] == 3
    assert len(found["steered"]["psnr_db"]["values"]) == 3
    assert found["steered"]["residual_rms"]["mean"] < found["not_steered"]["residual_rms"]["mean"]
    assert found["steered"]["psnr_db"]["mean"] > found["not_steered"]["psnr_db"]["mean"]
    assert set(found["steered"]) == {"psnr_db", "ssim", "residual_rms"}
    assert np.load(folder / f"held-{task}/restored.npy").shape == (3, 1, 8, 8)
    assert Image.open(folder / f"held-{task}/before-after.png").width > 300


def test_an_image_and_a_mask(folder, capsys):
    words = ["--image", str(folder / "grey.png"), "--mask", str(folder / "keep.png")]
    found = inverse(folder, *words, "--step-size", "0.4", out="masked")
    assert found["degradation"].endswith("keep.png")
    assert found["steering"]["step_size"] == 0.4
    assert "1 images, dB PSNR" in capsys.readouterr().out
    again = ["inverse", str(folder / "run/model"), *SHORT, "--out", str(folder / "masked")]
    assert "exists: choose another --out or pass --overwrite" in fails(again, capsys)
    (folder / "masked/notes.txt").write_text("mine")
    inverse(folder, *words, "--step-size", "0.2", "--overwrite", out="masked")
    assert {path.name for path in (folder / "masked").iterdir()} == {
        "before-after.png", "restored.npy", "result.json", "notes.txt",
    }  # fmt: skip


def test_what_is_measured_already_is_restored_as_it_is(folder):
    words = ["--task", "sr", "--measured", "--image", str(folder / "small.png")]
    found = inverse(folder, *words, out="measured")
    assert set(found["steered"]) == {"residual_rms"}


def test_other_degradations_and_noise(folder):
    found = inverse(folder, "--degradation", "motion:3:30", "--noise", "0.1", out="motion")
    assert found["noise"] == 0.1
    jpeg = inverse(folder, "--degradation", "jpeg:20", "--count", "2", out="jpeg")
    assert jpeg["steered"]["residual_rms"]["mean"] < jpeg["not_steered"]["residual_rms"]["mean"]


@pytest.mark.parametrize("task", ["inpaint", "sr"])
def test_latents_of_a_pipeline(tmp_path, task, monkeypatch):
    monkeypatch.setenv("RECTIFLOW_CACHE", str(tmp_path / "cache"))
    shared("sd3").save_pretrained(tmp_path / "pipe")
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    words = ["--image", str(tmp_path / "picture.png"), "--task", task, "--prompt", "a red fox"]
    out = ["--steps", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["inverse", str(tmp_path / "pipe"), *words, *out]) == 0
    assert np.load(tmp_path / "out/restored.npy").shape == (1, 3, 16, 16)


def test_a_mask_without_a_whole_cell_of_latents_is_refused():
    keep = torch.zeros(1, 8, 8)
    keep[:, :4, 1:5] = 1
    opened = SimpleNamespace(pipe=object(), latents=lambda images: images[..., ::4, ::4])
    with pytest.raises(ValueError, match="no whole cell of the latents, which are 4x4 pixels"):
        cost_of(opened, Mask(keep), torch.zeros(1, 3, 8, 8))
    cost = cost_of(opened, Mask(keep.roll(-1, -1)), torch.zeros(1, 3, 8, 8))
    assert cost.keep.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mask", "wide.png"], "the mask is 16x8 but the image is 8x8"),
        (["--mask", "none.png"], "the mask keeps nothing"),
        (["--mask", "all.png"], "the mask keeps everything"),
        (["--mask", "gone.png"], "no mask"),
        (["--task", "sr", "--mask", "keep.png"], "--mask is for --task inpaint"),
        (["--image", "small.png"], "4x4 pixels but the model takes 8x8"),
        (["--image", "colour.png"], "it is coloured but the model takes grey images"),
        (["--image", "far.npy"], "far.npy"),
        (["--image", "gone.png"], "does not exist"),
        (["--task", "colour"], "must have 3 channels to be made grey, got 1"),
        (["--degradation", "bluur:3:1"], "did you mean 'blur'"),
        (["--noise", "-1"], "noise must be >= 0"),
        (["--measured"], "--measured needs --image"),
        (["--step-size", "nan"], "step_size must be finite and >= 0, got nan"),
        (["--step-size", "3"], "step_size must be below 1"),
        (["--until", "2"], "until must be in [0, 1]"),
    ],
)
def test_bad_input(folder, words, said, capsys):
    given = [str(folder / w) if w.endswith((".png", ".npy")) else w for w in words]
    model = [str(folder / "run/model"), "--steps", "20", "--device", "cpu"]
    shown = fails(["inverse", *model, *given, "--out", str(folder / "never")], capsys)
    assert said in shown
    assert not (folder / "never").exists()


def sampled(folder: Path, name: str, *words: str) -> np.ndarray:
    out = str(folder / f"{name}.npy")
    model = [str(folder / "run/model"), *SHORT, "--count", "4", "--out", out]
    assert main(["sample", *model, *words]) == 0
    return np.load(out)


def test_samples_are_steered_to_a_picture_and_to_a_class(folder, tmp_path):
    plain = sampled(folder, "plain")
    words = f"inpaint:{folder / 'grey.png'},mask={folder / 'keep.png'},step=0.2"
    filled = sampled(folder, "filled", "--steer", words)
    truth = np.asarray(Image.open(folder / "grey.png")) / 127.5 - 1
    kept = np.asarray(Image.open(folder / "keep.png")) > 0
    error = [np.abs((x[:, 0] - truth)[:, kept]).mean() for x in (plain, filled)]
    assert error[1] < 0.5 * error[0]
    classed = sampled(folder, "classed", "--steer", "classifier:3,step=0.05,until=0.8,skip=no")
    assert not np.array_equal(classed, plain)


@pytest.mark.parametrize(
    "words, said",
    [
        ("classify:3", "did you mean 'classifier'"),
        ("classifier", "needs a value: classifier:LABEL"),
        ("sr", "needs a value: sr:IMAGE"),
        ("classifier:12", "unknown class '12'"),
        ("classifier:3,stepp=1", "did you mean 'step'"),
        ("classifier:3,step", "options of --steer are KEY=VALUE, got 'step'"),
        ("classifier:3,step=x", "step of --steer must be a number, got 'x'"),
        ("classifier:3,skip=maybe", "skip of --steer must be yes or no"),
        ("classifier:3,mask=keep.png", "classifier takes no mask"),
        ("sr:gone.png", "does not exist"),
    ],
)
def test_bad_words_of_steering(folder, words, said, capsys):
    command = ["sample", str(folder / "run/model"), *SHORT, "--steer", words]
    assert said in fails([*command, "--out", str(folder / "never.npy")], capsys)


def test_guidance_needs_a_class_to_guide_toward(folder, tmp_path, capsys):
    words = ["train", "--net", "mlp-2d", "--conditional", "--steps", "2", "--batch-size", "8"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    words = ["inverse", str(tmp_path / "run/model"), *SHORT, "--count", "1", "--guidance", "2"]
    assert "--guidance needs a --label" in fails([*words, "--out", str(tmp_path / "a")], capsys)
    plain = [*words[:-2], "--label", "3", "--out", str(tmp_path / "b")]
    assert main(plain) == 0
    assert main([*words, "--label", "3", "--out", str(tmp_path / "c")]) == 0
    b, c = (np.load(tmp_path / name / "restored.npy") for name in ("b", "c"))
    assert np.abs(b - c).max() > 1e-4
