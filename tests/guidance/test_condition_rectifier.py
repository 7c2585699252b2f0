"""The module that says shifts: what it promises, and its folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.guidance.relations import ENDS, WIDTH, examples, prompts, rectifier

from rectiflow.errors import ModelFolderError
from rectiflow.guidance import (
    ConditionRectifier,
    RelationGraph,
    RelationPrompts,
    symmetric_relation,
)
from rectiflow.guidance.relation_prompts import shift_ends


def test_each_prompt_takes_its_shift_from_the_graph_that_begins_with_it() -> None:
    made, given = rectifier(), prompts()
    forward, backward = given.nodes()
    a, r, b = given.words
    ends = given.condition["context"][torch.arange(4), ENDS, :WIDTH]
    torch.testing.assert_close(forward, torch.stack([a, r, b, ends[2], ends[0]]))
    torch.testing.assert_close(backward, torch.stack([b, r, a, ends[3], ends[1]]))
    deltas = made.shifts(given).deltas
    wanted = [made(forward)[1], made(backward)[1], made(forward)[0], made(backward)[0]]
    torch.testing.assert_close(deltas, torch.stack(wanted))


def test_cap_bounds_shifts_by_what_they_shift() -> None:
    given = prompts()
    free, capped = rectifier().shifts(given).deltas, rectifier(cap=0.1).shifts(given).deltas
    bound = 0.1 * given.end_vectors().norm(dim=1)
    assert (free.norm(dim=1) > bound).all()
    torch.testing.assert_close(capped.norm(dim=1), bound)
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(free, capped), torch.ones(4), rtol=0, atol=1e-6
    )
    assert torch.equal(rectifier(cap=1e6).shifts(given).deltas, free)


def test_shifting_touches_one_token_of_one_row_and_no_input() -> None:
    value, delta = torch.randn(3, 4, 5), torch.randn(3, 2)
    before, ends = value.clone(), torch.tensor([0, 3, 1])
    found = shift_ends(value, ends, delta)
    assert torch.equal(value, before)
    changed = torch.zeros(3, 4, 5, dtype=torch.bool)
    changed[torch.arange(3), ends, :2] = True
    assert torch.equal(found[~changed], value[~changed])
    torch.testing.assert_close(found[changed].view(3, 2), before[changed].view(3, 2) + delta)
    vectors = torch.randn(3, 5)
    assert torch.equal(shift_ends(vectors, None, delta)[:, 2:], vectors[:, 2:])


def test_saved_and_loaded(tmp_path) -> None:
    made = rectifier(cap=0.5, graph=symmetric_relation, about={"texts": {"a": "fox"}})
    made.save_pretrained(tmp_path / "r")
    again = ConditionRectifier.from_pretrained(tmp_path / "r")
    assert torch.equal(again.shifts(prompts()).deltas, made.shifts(prompts()).deltas)
    assert (again.cap, again.graph, again.about) == (0.5, symmetric_relation, made.about)
    assert not again.training
    files = {file.name for file in (tmp_path / "r").iterdir()}
    assert files == {"rectifier.safetensors", "config.json"}
    with pytest.raises(FileExistsError, match="exists: choose another"):
        made.save_pretrained(tmp_path / "r")
    made.save_pretrained(tmp_path / "r", overwrite=True)
    half = made.half()
    assert half.shifts(prompts()).deltas.dtype == torch.float16


def test_damaged_folders_are_named(tmp_path) -> None:
    folder = tmp_path / "r"
    rectifier().save_pretrained(folder)
    weights, config = folder / "rectifier.safetensors", folder / "config.json"
    whole, facts = weights.read_bytes(), json.loads(config.read_text())
    assert load_file(weights)
    load = ConditionRectifier.from_pretrained
    with pytest.raises(FileNotFoundError, match="no folder of a rectifier"):
        load(tmp_path / "none")
    weights.write_bytes(whole[:-1])
    with pytest.raises(ModelFolderError, match="SHA-256 differs"):
        load(folder)
    weights.write_bytes(whole)
    for wrong, message in (
        ({"kind": "model"}, "describes no rectifier"),
        ({"format": 99}, "reads up to 1"),
        ({"format": "1"}, "has format '1'"),
        ({"sha256": None}, "SHA-256 differs"),
        ({"graph": "directd"}, "did you mean 'directed'"),
        ({"net": {"width": 7, "hidden": 5, "heads": 2}}, "describes no rectifier"),
        ({"net": {"width": 0}}, "width must be > 0"),
    ):
        config.write_text(json.dumps({**facts, **wrong}))
        with pytest.raises(ModelFolderError, match=message):
            load(folder)
    config.write_text(json.dumps({n: v for n, v in facts.items() if n != "sha256"}))
    with pytest.raises(ModelFolderError, match="SHA-256 differs"):
        load(folder)
    config.write_text("{")
    with pytest.raises(ModelFolderError, match="not valid JSON"):
        load(folder)
    config.write_text(json.dumps(facts))
    weights.unlink()
    with pytest.raises(ModelFolderError, match=r"has no rectifier\.safetensors"):
        load(folder)
    config.unlink()
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        load(folder)


def test_a_graph_of_ones_own_works_but_is_not_saved(tmp_path) -> None:
    def empty(roles: tuple[str, ...]) -> RelationGraph:
        return RelationGraph(symmetric_relation(roles).kinds, ((),) * 5)

    made = rectifier(graph=empty)
    assert made.shifts(prompts()).deltas.shape == (4, WIDTH)
    with pytest.raises(ValueError, match="cannot be saved"):
        made.save_pretrained(tmp_path / "r")


def test_parts_that_do_not_fit_are_refused() -> None:
    good = prompts()
    with pytest.raises(ValueError, match="no 'text' to shift, only context"):
        RelationPrompts(good.condition, good.words, good.ends, "text")
    with pytest.raises(ValueError, match="needs a row for each of ARB, BRA, A, B"):
        RelationPrompts({"context": torch.zeros(3, 4, 8)}, good.words, good.ends)
    with pytest.raises(ValueError, match="words are three vectors"):
        RelationPrompts(good.condition, good.words[:2], good.ends)
    with pytest.raises(ValueError, match="must be one vector a prompt"):
        RelationPrompts(good.condition, good.words)
    with pytest.raises(ValueError, match="at least the 20 numbers of a word"):
        RelationPrompts(good.condition, torch.zeros(3, 20), good.ends)
    with pytest.raises(ValueError, match="belongs to another text encoder"):
        rectifier(width=7).shifts(good)
    with pytest.raises(ValueError, match="cap must be > 0"):
        rectifier(cap=0.0)
    with pytest.raises(ValueError, match="there are no pictures of BRA"):
        type(examples())(good, {"ARB": torch.zeros(1, 2), "BRA": torch.zeros(0, 2)})
