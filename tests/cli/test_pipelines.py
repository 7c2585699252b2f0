"""`pairs`, `reflow` and `distill` with a diffusers pipeline as the teacher, end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.interop.pipelines import PROMPTS, noises, quiet, sd, shared, stock
from tests.stirring import stirred

from rectiflow.cli import main
from rectiflow.flows import FlowModel, PairStore, sample
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.flows.integration import integrate
from rectiflow.interop.diffusers import decode_latents, encode_prompts, from_pipeline, with_prompts

SHORT = ["--steps", "2", "--batch-size", "4", "--log-every", "1"]
PAIRS = ["--count", "6", "--steps", "2", "--init", "analytic", "--no-check", "--device", "cpu"]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """Pipelines, files of prompts, and guided pairs of the first of both."""
    folder = tmp_path_factory.mktemp("pipelines")
    shared("sd").save_pretrained(folder / "pipe")
    other = sd()
    stirred(other.unet, 0.01)
    other.save_pretrained(folder / "other")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "more.txt").write_text("a green hat\n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "long.txt").write_text("a fox\n" + "x" * 10_000)
    found = {file.stem: str(file) for file in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECTIFLOW_CACHE", str(folder / "cache"))
        words = [found["pipe"], "--prompts", found["prompts"], "--guidance", "2", *PAIRS]
        assert main(["pairs", *words, "--out", str(folder / "pairs")]) == 0
    return {**found, "pairs": str(folder / "pairs"), "cache": str(folder / "cache")}


@pytest.fixture(autouse=True)
def _cache(given, monkeypatch) -> None:
    monkeypatch.setenv("RECTIFLOW_CACHE", given["cache"])


def trained(words: list[str], out: Path) -> FlowModel:
    report = ["--report", "2"] if words[0] == "reflow" else []
    assert main([*words, *report, *SHORT, "--out", str(out)]) == 0
    return FlowModel.from_pretrained(out / "model")


def fails(words: list[str], capsys) -> str:
    """The line that a wrong command ends with; its status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def teacher() -> FlowModel:
    table = encode_prompts(shared("sd"), PROMPTS, cache=None)
    return with_prompts(from_pipeline(shared("sd"), init="analytic"), table)


def test_pairs_are_what_the_guided_pipeline_makes(given) -> None:
    store = PairStore(given["pairs"])
    source, target, condition = store.rows(torch.arange(6))
    assert sorted(condition["prompt"].tolist()) == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        guided = ClassifierFreeGuidance(teacher(), 2.0)
        expected = integrate(guided, source, 2, "euler", **condition)
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-4)
    assert store.settings.guidance == "ClassifierFree(scale=2.0)"
    assert store.settings.teacher["lineage"][-1]["method"] == "prompts"


def test_reflow_with_adapters_then_one_step_in_a_stock_pipeline(given, tmp_path) -> None:
    """The whole chain: stored guided pairs, adapters, distillation, and diffusers alone."""
    from diffusers import DiffusionPipeline

    prompts = ["--prompts", given["prompts"]]
    words = ["reflow", given["pipe"], *prompts, "--method", "text-reflow", "--pairs"]
    words += [given["pairs"], "--guidance", "2", "--init", "reinterpret", "--lora", "2"]
    straight = trained(words, tmp_path / "a")
    assert straight.net.name == "diffusers"
    assert straight.net.reading.kind == "flow"
    assert (tmp_path / "a/adapters.safetensors").is_file()
    assert (tmp_path / "a/straightening.json").is_file()
    made = straight.lineage[-1]
    expected = {"method": "text-reflow", "lora": 2, "init": "reinterpret", "guidance": 2}
    assert expected.items() <= made.items()
    assert made["systems"] == ["rectified-flow", "instaflow"]
    before = shared("sd").unet.state_dict()
    after = straight.net.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".to_" in name for name in moved)

    out = tmp_path / "stock"
    words = ["distill", str(tmp_path / "a/model"), *prompts, "--teacher-steps", "2"]
    student = trained([*words, "--export-pipeline", str(out)], tmp_path / "b")
    assert [e["method"] for e in student.lineage if "systems" in e] == ["text-reflow", "distil"]
    table = encode_prompts(shared("sd"), PROMPTS, cache=None)
    ours = sample(student, source=noises(), **table.everything())
    pipe = quiet(DiffusionPipeline.from_pretrained(out))
    torch.testing.assert_close(ours, stock("sd", pipe, 1), atol=1e-4, rtol=1e-4)


def test_two_copies_in_series(given, tmp_path) -> None:
    words = ["distill", given["pipe"], "--prompts", given["prompts"], "--init", "reinterpret"]
    words += ["--student", "stacked:mode=residual", "--teacher-steps", "1"]
    student = trained(words, tmp_path / "a")
    assert (student.net.name, student.net.mode) == ("stacked", "residual")
    assert student.conditional
    out = tmp_path / "x.npy"
    words = ["sample", str(tmp_path / "a/model"), "--prompt", "a fox", "--count", "2"]
    assert main([*words, "--out", str(out)]) == 0
    # The folder of one starts another training.
    words = ["distill", given["pipe"], "--prompts", given["prompts"], "--pairs", given["pairs"]]
    again = trained([*words, "--init", "analytic", "--student", str(tmp_path / "a/model")],
                    tmp_path / "b")  # fmt: skip
    assert again.net.mode == "residual"


def test_a_negative_prompt_takes_the_place_of_none(given, tmp_path, capsys) -> None:
    """The text goes into the table behind the prompts, and samples are guided away from it."""
    words = ["sample", given["pipe"], "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    words += ["--count", "2", "--steps", "2", "--init", "analytic", "--device", "cpu"]
    away = [*words, "--negative", "a green hat"]
    out = tmp_path / "x.npy"
    assert main([*away, "--guidance", "3", "--out", str(out)]) == 0
    table = encode_prompts(shared("sd"), [*PROMPTS[:2], "a green hat"], cache=None)
    model = with_prompts(from_pipeline(shared("sd"), init="analytic"), table)
    guided = ClassifierFreeGuidance(model, 3.0, negative={"prompt": 2})
    latents = sample(
        model,
        2,
        steps=2,
        field=guided,
        generator=torch.Generator().manual_seed(0),
        prompt=torch.tensor([0, 1]),
    )
    expected = decode_latents(shared("sd"), latents).detach()
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected, atol=1e-4, rtol=1e-4)
    assert "give --guidance too" in fails([*away, "--out", str(tmp_path / "y.npy")], capsys)
    words = ["sample", given["pipe"], "--negative", "a hat", "--guidance", "3"]
    assert "--negative needs a --prompt" in fails([*words, "--out", "z.npy"], capsys)


@pytest.mark.parametrize("command", ["sample", "inverse"])
def test_long_prompts_are_cut_on_request_only(given, tmp_path, capsys, command) -> None:
    long = "a fox jumping over a dog " * 3
    words = [command, given["pipe"], "--prompt", long, "--count", "1", "--steps", "1"]
    words += ["--out", str(tmp_path / "out"), "--init", "analytic"]
    assert "pass --truncate to have it cut" in fails(words, capsys)
    if command == "sample":
        assert main([*words, "--truncate"]) == 0


def test_pairs_of_other_prompts_guidance_or_weights_are_refused(given, tmp_path, capsys) -> None:
    def says(model: str, prompts: str, *words: str) -> str:
        base = ["reflow", given[model], "--prompts", given[prompts], "--pairs", given["pairs"]]
        return fails([*base, *SHORT, *words, "--out", str(tmp_path / "x")], capsys)

    assert "was made with other prompts" in says("pipe", "more")
    assert "scale=3.0" in says("pipe", "prompts", "--guidance", "3")
    assert "was made by a teacher with weights" in says("other", "prompts")


@pytest.mark.parametrize(
    "words, message",
    [
        (["reflow", "pipe"], "takes prompts: give them by --prompts FILE"),
        (["reflow", "pipe", "--prompts", "empty"], "holds no prompts: write one a line"),
        (["reflow", "pipe", "--prompts", "long"], "line 2 of"),
        (["pairs", "pipe", "--prompts", "long"], "has 10000 characters, at most 4000"),
        (["pairs", "pipe"], "takes prompts: give them by --prompts FILE"),
        (
            ["pairs", "pipe", "--prompts", "prompts", "--init", "reinterpret"],
            "makes no images before it is trained",
        ),
        (
            ["reflow", "pipe", "--prompts", "prompts", "--method", "text-reflow"],
            "needs a start on the rectified path, got 'table'",
        ),
        (
            ["reflow", "pipe", "--prompts", "prompts", "--method", "phased"],
            "phased trains on data, and a pipeline brings none: take a method that trains on pairs",
        ),
        (["distill", "pipe", "--method", "f-distill"], "f-distill trains on data, and a pipeline"),
        (
            ["reflow", "pipe", "--prompts", "prompts", "--student", "mlp:width=8"],
            "the teacher takes prompts and mlp:width=8 does not: take stacked",
        ),
        (
            ["reflow", "pipe", "--lora", "2", "--student", "unet-7m"],
            "--lora adapts trained weights and unet-7m has random ones",
        ),
        (["distill", "pipe", "--method", "consistency", "--lora", "2"], "leave out --lora"),
        (["reflow", "pipe", "--lora", "0"], "lora must be"),
        (["reflow", "pipe", "--export-pipeline", "pipe"], "choose another --export-pipeline"),
        (
            ["distill", "pipe", "--prompts", "prompts", "--init", "reinterpret", "--student",
             "stacked", "--export-pipeline", "new"],
            "stacked and other networks have no place in it",
        ),
        (
            ["distill", "pipe", "--prompts", "prompts", "--init", "analytic", "--one-step.steps",
             "4", "--export-pipeline", "new"],
            "no stock scheduler takes the 4 steps",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(given, words, message, tmp_path, capsys) -> None:
    known = {**given, "new": str(tmp_path / "new")}
    words = [words[0], *(known.get(word, word) for word in words[1:])]
    out = tmp_path / "out"
    assert message in fails([*words, "--out", str(out)], capsys)
    assert not out.exists()
    assert not (tmp_path / "new").exists()
