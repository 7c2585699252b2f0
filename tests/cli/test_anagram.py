"""`rectiflow anagram`: what it writes, that it says what is wrong."""

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
from rectiflow.cli.reveal import MOVES, write_reveal
from rectiflow.cli.view_words import views_of
from rectiflow.flows import FlowModel
from rectiflow.guidance import Anagram, ClassifierFreeGuidance
from rectiflow.guidance.views import Flip, Identity, Negate, Rotate
from rectiflow.nets import MMDiT

SHORT = ["--steps", "3", "--count", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without labels, a few pictures that they stand for, and a pipeline."""
    root = tmp_path_factory.mktemp("anagram")
    generator = np.random.default_rng(0)
    for label in range(10):
        (root / f"pictures/{label}").mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"pictures/{label}/{number}.png")
    for name, classes in (("model", 10), ("plain", 0)):
        net = MMDiT(shape=(1, 8, 8), depth=1, heads=2, head_dim=8, classes=classes)
        data = {"name": "pictures", "spec": f"folder:{root / 'pictures'}"}
        FlowModel(stirred(net), shape=(1, 8, 8), data=data).save_pretrained(root / name)
    shared("sd").save_pretrained(root / "pipe")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # One for all tests: the classifier that balances is trained once, and not long.
    folder = tmp_path_factory.getbasetemp() / "anagram-cache"
    monkeypatch.setenv("RECTIFLOW_CACHE", str(folder))
    monkeypatch.setattr("rectiflow.training.evaluation.feature_net.STEPS", 2)


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    lines = [one for one in capsys.readouterr().err.splitlines() if one]
    assert lines[-1].startswith("rectiflow anagram: ")
    assert sum(one.startswith("rectiflow") for one in lines) == 1
    return lines[-1]


def test_pictures_animation_and_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--views", "identity,rotate:90", "--labels", "3,8", *SHORT, "--batch-size", "2"]
    assert main(["anagram", str(folder / "model"), *words, "--out", str(out)]) == 0
    assert "3 pictures in 2 views, worst view scores" in capsys.readouterr().out
    model = FlowModel.from_pretrained(folder / "model").eval()
    expected = Anagram(
        model,
        [(Identity(), {"label": 3}), (Rotate(90), {"label": 8})],
        guide=lambda model: ClassifierFreeGuidance(model, 3.0),
        steps=3,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([expected(2, generator=generator), expected(1, generator=generator)])
    found = np.load(out / "samples.npy")
    np.testing.assert_allclose(found, images.clamp(-1, 1), atol=1e-5)
    # Three rows of two views, every pixel eight times as large.
    assert Image.open(out / "views.png").size == (17 * 8, 26 * 8)
    record = json.loads((out / "result.json").read_text())
    assert record["wanted"] == ["3", "8"]
    assert record["overlap"] is None
    assert record["scores"]["judge"] == "logistic regression"
    assert len(record["scores"]["alignment"]) == 3
    assert np.shape(record["scores"]["mean"]) == (2, 2)
    assert record["settings"]["guidance"] == 3
    with Image.open(out / "reveal.gif") as film:
        assert film.n_frames > MOVES


def test_every_combination_and_rectification(folder: Path, tmp_path: Path) -> None:
    model = [str(folder / "model"), "--labels", "3", "8", *SHORT, "--no-reveal"]
    seen = []
    for number, words in enumerate(
        (
            ["--combine", "mean"],
            ["--combine", "balanced"],
            ["--combine", "min-norm"],
            ["--combine", "alternate"],
            ["--combine", "sum", "--views", "low:1,high:1"],
            ["--rectify", "official", "--solver", "sde"],
            ["--rectify", "matched", "--guidance", "apg:4,norm=2"],
            ["--antiseg-lr", "5"],
        )
    ):
        out = tmp_path / str(number)
        assert main(["anagram", *model, *words, "--out", str(out)]) == 0
        seen.append(np.load(out / "samples.npy"))
        assert not (out / "reveal.gif").exists()
    assert all(not np.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])
    record = json.loads((tmp_path / "7" / "result.json").read_text())
    assert np.shape(record["overlap"]) == (3,)


def test_a_pipeline_is_asked_by_prompts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--prompts", "a fox", "a cat", "--style", "oil", "--views", "identity,flip+negate"]
    words += [*SHORT, "--solver", "euler", "--antiseg-lr", "5", "--out", str(out)]
    assert main(["anagram", str(folder / "pipe"), *words]) == 0
    record = json.loads((out / "result.json").read_text())
    assert record["wanted"] == ["oil a fox", "oil a cat"]
    assert record["scores"] is None
    assert np.shape(record["overlap"]) == (3,)
    assert np.load(out / "samples.npy").shape == (3, 3, 16, 16)
    shown = fails(["anagram", str(folder / "pipe"), *words], capsys)
    assert "exists: choose another --out or pass --overwrite" in shown
    (out / "notes.txt").write_text("mine")
    assert main(["anagram", str(folder / "pipe"), *words, "--no-reveal", "--overwrite"]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"views.png", "samples.npy", "result.json", "notes.txt"}


def test_the_reveal_moves_pixels_to_their_places(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    views = [Identity(), Flip(), Negate()]
    file = write_reveal([v.apply(images) for v in views], views, tmp_path / "reveal.gif")
    with Image.open(file) as film:
        frames, held = [], []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("L"), dtype=np.float32) / 127.5 - 1)
            held.append(film.info["duration"])
    stops = [number for number, time in enumerate(held) if time > 1000]
    for place, view in zip(stops, views):
        # The first picture, at the middles of its squares of eight pixels.
        seen = frames[place][4:64:8, 4:64:8]
        np.testing.assert_allclose(seen, view.apply(images)[0, 0], atol=0.02)


def test_parts_from_words_add_up() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for words in ("low:1,high:1", "grey,colour", "motion:5:45,still:5:45", "share:0.3,share:0.7"):
        parts = views_of([words], (3, 16, 16))
        one, other = (part.inverse(x) for part in parts)
        torch.testing.assert_close(one + other, x, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one, x)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "say what each view shows: --labels 3,8 or --prompts TEXT TEXT"),
        (["--labels", "3,8", "--prompts", "a", "b"], "say what each view shows"),
        (["--labels", "3,8", "--views", "identity,blur"], "the view 'blur' is not orthogonal"),
        (["--labels", "3,8", "--views", "identity,rotate:30"], "30 degrees is not orthogonal"),
        (["--labels", "3,8", "--views", "identity,flop"], "unknown view 'flop'"),
        (["--labels", "3,8", "--views", "identity,patch-permute:3"], "cannot be cut into 3x3"),
        (["--labels", "3,8", "--views", "identity,low:x"], "the part 'low:x' is not understood"),
        (["--labels", "3,8", "--views", "identity,low:1"], "the view Part is not orthogonal"),
        (["--labels", "3,8", "--views", "low:1,low:2", "--combine", "sum"], "must add up to"),
        (["--labels", "3,8", "--views", "share,flip"], "write share:WEIGHT"),
        (["--labels", "3"], "there are 2 views and 1 labels: give one for each view"),
        (["--labels", "3,12"], "--label must be in 0 to 9, got 12"),
        (["--labels", "3,x"], "--labels are numbers of classes, got 3,x"),
        (["--labels", "3,8", "--guidance", "-1"], "guidance must be >= 0, got -1"),
        (["--labels", "3,8", "--guidance", "nan"], "guidance must be >= 0, got nan"),
        (["--labels", "3,8", "--antiseg-lr", "nan"], "antiseg_lr must be >= 0, got nan"),
        (["--labels", "3,8", "--antiseg-lr", "-5"], "antiseg_lr must be >= 0, got -5"),
        (["--labels", "3,8", "--antiseg-lr", "inf"], "antiseg_lr must be finite"),
        (["--labels", "3,8", "--antiseg-until", "2"], "antiseg_until must be in [0, 1]"),
        (["--labels", "3,8", "--steps", "0"], "steps must be > 0"),
        (["--labels", "3,8", "--combine", "means"], "mean"),
        (["--labels", "3,8", "--combine", "sum", "--rectify", "matched"], "takes no mean"),
        (["--labels", "3,8", "--clip", "x"], "--clip scores prompts"),
        (["--labels", "3,8", "--concepts", "x"], "--concepts are words of prompts"),
        (["--prompts", "a", "b"], "the model takes class labels"),
        (
            ["--labels", "3,8", "--combine", "alternate", "--guidance", "apg:4"],
            "set momentum=0",
        ),
    ],
)
def test_wrong_settings(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    out = tmp_path / "never"
    shown = fails(["anagram", str(folder / "model"), *words, "--out", str(out)], capsys)
    assert said in shown
    assert not out.exists()


@pytest.mark.parametrize(
    "model, words, said",
    [
        ("plain", ["--labels", "3,8"], "the model takes no labels"),
        ("pipe", ["--labels", "3,8"], "the model takes no labels"),
        ("nowhere", ["--labels", "3,8"], "nowhere"),
        ("pipe", ["--prompts", "a fox jumping over a dog", "a"], "takes 16: shorten it, or pass"),
        (
            "pipe",
            ["--prompts", "a fox", "a cat", "--combine", "balanced"],
            "name a CLIP model by --clip",
        ),
        (
            "pipe",
            ["--prompts", "a fox", "a cat", "--antiseg-lr", "5", "--concepts", "fox", "dog"],
            "the concept 'dog' is not in the prompt 'a cat'",
        ),
        (
            "pipe",
            ["--prompts", "a fox", "a cat", "--antiseg-lr", "5", "--concepts", "fox"],
            "there are 2 prompts and 1 concepts",
        ),
        ("pipe", ["--prompts", "a", "b", "--clip", "no/such/clip"], "no CLIP model could be read"),
    ],
)
def test_wrong_models_and_prompts(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    words: list[str],
    said: str,
) -> None:
    shown = fails(
        ["anagram", str(folder / model), *words, "--out", str(tmp_path / "never")], capsys
    )
    assert said in shown
