"""`rectiflow relations`: what it writes, that it goes on, that it says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.interop.pipelines import SIZE, ddim, sd, shared

from rectiflow.cli import main
from rectiflow.cli.relations import Settings, _begin, _open
from rectiflow.flows import FlowModel
from rectiflow.guidance import ConditionRectifier
from rectiflow.nets import MLP

INDEX = {"A": "fox", "R": "in", "B": "box", "ARB": "a fox in a box", "BRA": "a box in a fox"}
SHORT = ["--iters", "2", "--hidden", "8", "--object-prompt", "a {}"]
FEW = ["--pictures", "1", "--sampling-steps", "2", "--guidance", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines, a model without words, and the folder of a relation."""
    root = tmp_path_factory.mktemp("relations")
    shared("sd").save_pretrained(root / "pipe")
    shared("flux").save_pretrained(root / "flux")
    shared("sd3").save_pretrained(root / "sd3")
    sd(ddim(prediction_type="v_prediction")).save_pretrained(root / "v")
    FlowModel(MLP(shape=(1, 8, 8), width=8, depth=1), shape=(1, 8, 8)).save_pretrained(root / "mlp")
    generator = np.random.default_rng(0)
    for name in ("ARB", "BRA", "A", "B"):
        for number in range(2):
            file = root / "relation" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(file)
    (root / "relation" / "index.json").write_text(json.dumps(INDEX))
    return root


def copied(folder: Path, tmp_path: Path, **index: object) -> Path:
    """The relation's folder with another index; a key that is None is left out."""
    target = shutil.copytree(folder / "relation", tmp_path / "relation")
    table = {key: value for key, value in {**INDEX, **index}.items() if value is not None}
    (target / "index.json").write_text(json.dumps(table))
    return target


def words(folder: Path, out: Path, *more: str, pipe: str = "pipe") -> list[str]:
    relation = [] if "--rectifier" in more else ["--relation-dir", str(folder / "relation")]
    return ["relations", str(folder / pipe), *relation, *SHORT, *FEW, "--out", str(out), *more]


def fails(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a wrong command prints; its status must be 2."""
    capsys.readouterr()
    assert main(command) == 2
    lines = [one for one in capsys.readouterr().err.splitlines() if one]
    # diffusers and transformers draw bars while they read a pipeline.
    assert [one for one in lines if one.startswith("rectiflow relations: ")] == lines[-1:]
    return lines[-1]


def test_fits_applies_and_writes(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a"
    more = ["--w", "0", "0.5", "1", "--heldout-objects", "dog", "cup", "--early-stop-every", "1"]
    assert main(words(folder, out, *more)) == 0
    record = json.loads((out / "relations.json").read_text())
    assert record["w"] == [0, 0.5, 1]
    fitted, heldout = record["relations"]
    assert fitted["prompts"] == ["a fox in a box", "a box in a fox", "a fox", "a box"]
    assert heldout["prompts"][:2] == ["a dog in a cup", "a cup in a dog"]
    assert (fitted["heldout"], heldout["heldout"]) == (False, True)
    assert fitted["tokens"] == {"A": "f", "R": "i", "B": "b"}
    assert set(fitted["delta_norm"]) == {"ARB", "BRA", "A", "B"}
    assert min(fitted["delta_norm"].values()) > 0
    assert fitted["change"]["0"] == [0, 0]
    assert min(fitted["change"]["1"]) > min(fitted["change"]["0.5"]) > 0
    assert set(record["contrast"]) == {"before", "after"}
    assert [row["step"] for row in record["curve"]] == [5, 10]
    # Two prompts of one picture, three weights, each pixel four times as large.
    for one in (fitted, heldout):
        assert Image.open(out / one["picture"]).size == (4 * (3 * 17 - 1), 4 * (2 * 17 - 1))
    rectifier = ConditionRectifier.from_pretrained(out / "rectifier")
    assert rectifier.about["texts"]["a"] == "fox"
    assert json.loads((out / "run.json").read_text())["systems"] == ["rrnet"]
    assert not list(out.rglob("*.pkl"))
    assert "cosine of the ends" in capsys.readouterr().out
    # A rectifier that is there is applied as it is, to the same pictures.
    again = tmp_path / "b"
    command = words(folder, again, "--rectifier", str(out / "rectifier"), "--w", "0.5")
    assert main(command) == 0
    found = json.loads((again / "relations.json").read_text())
    assert found["w"] == [0, 0.5], "the frozen model is always shown"
    assert found["relations"][0]["change"]["0.5"] == fitted["change"]["0.5"]
    assert found["relations"][0]["delta_norm"] == fitted["delta_norm"]
    assert not (again / "rectifier").exists()


def test_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    more = ["--checkpoint-every", "5", "--w", "0"]
    assert main(words(folder, tmp_path / "a", *more)) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # The state after the first iteration, as if the run had been killed there.
    shutil.rmtree(tmp_path / "b/rectifier")
    (tmp_path / "b/checkpoints/step-00000010.pt").unlink()
    assert main(words(folder, tmp_path / "b", *more, "--resume")) == 0
    one, other = (
        ConditionRectifier.from_pretrained(tmp_path / name / "rectifier") for name in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "pipe, kind, output, space",
    [
        ("pipe", "auto", "epsilon", "noise"),
        ("v", "auto", "v_prediction", "v"),
        ("pipe", "v_prediction", "v_prediction", "v"),
        ("v", "sample", "sample", "data"),
        ("sd3", "auto", None, None),
    ],
)
def test_errors_are_measured_in_what_the_network_predicts(
    folder: Path, pipe: str, kind: str, output: str | None, space: str | None
) -> None:
    settings = Settings(
        model=str(folder / pipe),
        relation_dir=folder / "relation",
        object_prompt="a {}",
        hidden=4,
        prediction_type=kind,  # type: ignore[arg-type]
    )
    opened = _open(settings)
    _, _, method = _begin(settings, opened)
    assert method is not None
    assert method.loss_of.space == space
    assert getattr(opened.model.net.reading, "output", None) == output


@pytest.mark.parametrize(
    "change, message",
    [
        ({"R": "inside"}, "the relation word 'inside' is not in the prompt 'a fox in a box'"),
        ({"A": "wolf"}, "the object A 'wolf' is not in the prompt"),
        ({"BRA": None}, "index.json must give 'BRA' as a text, which is missing"),
        ({"R": 7}, "index.json must give 'R' as a text, got 7"),
        ({"B": "fox"}, "the objects A and B are both 'fox'"),
        ({"ARB": "a fox is in the blue box"}, "has 20 tokens but tokenizer of StableDiffusionPip"),
    ],
)
def test_wrong_indices(folder: Path, tmp_path: Path, capsys, change, message: str) -> None:
    copied(folder, tmp_path, **change)
    (tmp_path / "pipe").symlink_to(folder / "pipe")
    assert message in fails(words(tmp_path, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_folders(folder: Path, tmp_path: Path, capsys) -> None:
    relation = copied(folder, tmp_path)
    (tmp_path / "pipe").symlink_to(folder / "pipe")
    command = words(tmp_path, tmp_path / "out")
    Image.new("RGB", (8, 8)).save(relation / "BRA" / "small.png")
    assert "small.png cannot be used: it has 8x8 pixels but the model takes 16x16" in fails(
        command, capsys
    )
    (relation / "BRA" / "small.png").write_text("no picture")
    assert "small.png cannot be used: not an image" in fails(command, capsys)
    shutil.rmtree(relation / "BRA")
    assert "no images in" in fails(command, capsys)
    assert "BRA/ (looked for .png" in fails(command, capsys)
    (relation / "index.json").write_text("{")
    assert "index.json is not valid JSON" in fails(command, capsys)
    (relation / "index.json").unlink()
    assert "has no index.json: --relation-dir needs" in fails(command, capsys)
    shutil.rmtree(relation)
    assert "there is no folder" in fails(command, capsys)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--w", "-0.2"], "--w must be finite and >= 0, got -0.2"),
        (["--w", "nan"], "--w must be finite and >= 0, got nan"),
        (["--lambda-neg", "-1"], "lambda_neg must be >= 0, got -1.0"),
        (["--lambda-pos", "0", "--lambda-neg", "0"], "nothing to learn"),
        (["--hinge", "0"], "hinge must be > 0"),
        (["--iters", "0"], "iters must be > 0"),
        (["--lr", "-1"], "lr must be > 0"),
        (["--heldout-objects", "dog"], "--heldout-objects come in pairs A B, got 1 of them"),
        (["--heldout-objects", "dog", "dust"], "begin with the same token 'd'"),
        (["--object-prompt", "thing"], "needs {} once in its place, got 'thing'"),
        (["--prediction-type", "epsilom"], "prediction-type"),
        (["--guidance", "cfq:3"], "did you mean 'cfg'"),
        (["--guidance", "cfg:3,negative=1"], "negative in --guidance is a label"),
        (["--rectifier", "nowhere"], "no folder of a rectifier at nowhere"),
    ],
)
def test_wrong_settings(
    folder: Path, tmp_path: Path, capsys, more: list[str], message: str
) -> None:
    assert message in fails(words(folder, tmp_path / "out", *more), capsys)
    assert not (tmp_path / "out").exists()


def test_models_without_a_clip_context_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert "relations are between words and the model takes no condition" in fails(
        words(folder, out, pipe="mlp"), capsys
    )
    assert "the context of FluxPipeline is T5's" in fails(words(folder, out, pipe="flux"), capsys)
    kind = ["--prediction-type", "epsilon"]
    assert "this is a flow" in fails(words(folder, out, *kind, pipe="sd3"), capsys)
    both = words(folder, out, "--relation-dir", str(folder), "--rectifier", "r")
    assert "give --relation-dir to fit a rectifier, or --rectifier" in fails(both, capsys)
