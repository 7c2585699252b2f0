"""Opening our folders and diffusers pipelines alike; sampling and describing both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.interop.pipelines import PROMPTS, noises, shared

from rectiflow.cli import main
from rectiflow.cli.models import Opened, attach_prompts, open_model
from rectiflow.cli.options import choose_device
from rectiflow.flows import FlowModel, sample
from rectiflow.interop.diffusers import (
    decode_latents,
    encode_images,
    encode_prompts,
    from_pipeline,
    with_prompts,
)
from rectiflow.nets import MLP, build
from rectiflow.nets.stacked import Stacked


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A pipeline, a model trained from it, and models of our own."""
    folder = tmp_path_factory.mktemp("models")
    shared("sd").save_pretrained(folder / "pipe")
    student = open_model(str(folder / "pipe"), device="cpu", init="reinterpret").model
    student.sampling = {"solver": "euler", "steps": 2}
    student.save_pretrained(folder / "student")
    for name, classes in (("plain", 0), ("labelled", 3)):
        net = build("mlp", shape=(1, 8, 8), width=8, depth=1, classes=classes)
        FlowModel(net, shape=(1, 8, 8)).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("pipe", "student", "plain", "labelled")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RECTIFLOW_CACHE", str(tmp_path / "cache"))


def fails(words: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_pipeline_opens_as_the_interop_functions_make_it(folders) -> None:
    opened = open_model(folders["pipe"], device="cpu", prompt=PROMPTS, init="analytic")
    table = encode_prompts(shared("sd"), PROMPTS, cache=None)
    expected = with_prompts(from_pipeline(shared("sd"), init="analytic"), table)
    condition = opened.condition(5)
    assert condition["prompt"].tolist() == [0, 1, 0, 1, 0]
    x, t, rows = noises(), torch.tensor([0.2, 0.7]), torch.tensor([1, 0])
    with torch.no_grad():
        found = opened.model.velocity(x, t, prompt=rows)
        assert torch.equal(found, expected.velocity(x, t, prompt=rows))
        assert torch.equal(opened.images(x), decode_latents(shared("sd"), x))
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.equal(opened.latents(images), encode_images(shared("sd"), images))
    assert opened.model.lineage[0]["source"] == folders["pipe"]


def test_gradients_pass_the_decoder(folders) -> None:
    x = noises().requires_grad_(True)
    open_model(folders["pipe"], device="cpu").images(x).square().sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_a_trained_model_finds_its_pipeline(folders) -> None:
    opened = open_model(folders["student"], device="cpu", prompt=["a fox"])
    assert opened.condition(2)["prompt"].tolist() == [0, 0]
    direct = open_model(folders["pipe"], device="cpu", prompt=["a fox"], init="reinterpret")
    x, t = noises(), torch.tensor([0.0, 0.5])
    rows = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        expected = direct.model.velocity(x, t, prompt=rows)
        assert torch.equal(opened.model.velocity(x, t, prompt=rows), expected)
        assert torch.equal(opened.images(x), direct.images(x))


def test_our_models_pass_images_through(folders) -> None:
    opened = open_model(folders["plain"], device="cpu")
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert opened.images(x) is x
    assert opened.latents(x) is x
    assert opened.condition(3) == {}
    labelled = open_model(folders["labelled"], device="cpu")
    assert labelled.condition(3, 2)["label"].tolist() == [2, 2, 2]
    drawn = labelled.condition(3, generator=torch.Generator().manual_seed(1))
    again = labelled.condition(3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn["label"], again["label"])


def test_conditions_are_labels_or_text(folders) -> None:
    text = from_pipeline(shared("sd"), init="reinterpret")
    assert (text.conditional, text.classes) == (True, 0)
    stack = FlowModel(Stacked.of(text.net), shape=text.shape, data=text.data)
    assert stack.conditional
    assert not FlowModel(Stacked.of(MLP(shape=(2,), width=4, depth=1))).conditional
    assert (open_model(folders["labelled"], device="cpu").model.classes) == 3
    # A table reaches every network of a stack, and the stack that was given is left alone.
    opened = Opened(stack, torch.device("cpu"), folders["pipe"])
    table = attach_prompts(opened, PROMPTS)
    rows = torch.tensor([0, 1])
    with torch.no_grad():
        found = opened.model.velocity(noises(), torch.zeros(2), prompt=rows)
        expected = stack.velocity(noises(), torch.zeros(2), **table.rows(rows))
    assert torch.equal(found, expected)
    assert stack.net.first.prompts is None
    assert opened.model.net.first.module is stack.net.first.module


def test_sample_a_pipeline_with_prompts(folders, tmp_path) -> None:
    out = str(tmp_path / "x.npy")
    words = ["sample", folders["pipe"], "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    words += ["--init", "analytic", "--steps", "2", "--count", "3", "--device", "cpu"]
    assert main([*words, "--out", out]) == 0
    found = np.load(out)
    assert found.shape == (3, 3, 16, 16)
    model = open_model(folders["pipe"], device="cpu", prompt=PROMPTS, init="analytic")
    rows = {"prompt": torch.tensor([0, 1, 0])}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = model.images(sample(model.model, 3, steps=2, generator=generator, **rows))
    # The VAE decodes four at once there and here: the same numbers.
    np.testing.assert_array_equal(found, expected.numpy())


def test_sample_a_trained_model_to_a_sheet(folders, tmp_path) -> None:
    words = ["sample", folders["student"], "--prompt", "a fox", "--count", "2", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 100


def test_info_on_a_pipeline(folders, capsys) -> None:
    assert main(["info", folders["pipe"], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["network"], facts["shape"]) == ("diffusers", [4, 8, 8])
    assert facts["lineage"][0]["class"] == "StableDiffusionPipeline"


def test_what_does_not_fit_is_refused(folders, tmp_path, capsys) -> None:
    def says(*words: str) -> str:
        return fails(["sample", *words, "--out", str(tmp_path / "x.png")], capsys)

    assert "takes class labels" in says(folders["labelled"], "--prompt", "a fox")
    assert "takes no condition" in says(folders["plain"], "--prompt", "a fox")
    assert "--init is for diffusers pipelines" in says(folders["plain"], "--init", "analytic")
    assert "unknown init 'analytical'" in says(folders["pipe"], "--init", "analytical")
    assert "use --prompt" in says(folders["pipe"], "--prompt", "a fox", "--label", "1")
    assert "takes no labels" in says(folders["pipe"], "--label", "1")
    assert "is a pipeline itself" in says(folders["pipe"], "--pipeline", folders["pipe"])
    assert "makes images" in says(folders["plain"], "--pipeline", folders["pipe"])
    missing = says(folders["student"], "--pipeline", str(tmp_path / "gone"))
    assert "name the pipeline by --pipeline" in missing
    unknown = tmp_path / "other"
    unknown.mkdir()
    (unknown / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    assert "AudioLDMPipeline cannot be read as a flow" in says(str(unknown))
    empty = Path(tmp_path / "empty")
    empty.mkdir()
    assert "not a rectiflow model folder" in says(str(empty))


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [str(choose_device(name)) for name in ("auto", "cpu")] == ["cuda", "cpu"]
    # One GPU may be all that a process sees.
    for rank, index in (("0", 0), ("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        found = [str(choose_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")]
        assert found == [f"cuda:{index}", f"cuda:{index}", "cuda:0", "cpu"]
