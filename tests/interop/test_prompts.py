"""Prompts: files, embeddings on disk, and pairs that store row numbers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.interop.pipelines import MANY, PROMPTS, noises, shared, tokens
from tests.stirring import stirred

from rectiflow.distill import generate_pairs
from rectiflow.errors import RunExistsError
from rectiflow.flows import FlowModel, StoredPairs
from rectiflow.flows.couplings import Draw
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.interop.diffusers import (
    encode_prompts,
    from_pipeline,
    prompts,
    read_prompts,
    with_prompts,
)
from rectiflow.training import FlowMatching


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_rows_are_what_the_pipeline_encodes(name: str) -> None:
    pipe = shared(name)
    table = encode_prompts(pipe, PROMPTS, tokens=tokens(name), batch_size=1, cache=None)
    with torch.no_grad():
        if name == "sd":
            context, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
            pooled = None
        elif name == "flux":
            context, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=12)
            empty = pipe.encode_prompt([""], None, max_sequence_length=12)[0]
        elif name == "sdxl":
            context, empty, pooled, _ = pipe.encode_prompt(PROMPTS)
        else:
            context, empty, pooled, _ = pipe.encode_prompt(
                PROMPTS, None, None, max_sequence_length=12
            )
    rows = table.everything()
    # Another batch size sums in another order.
    torch.testing.assert_close(rows["context"], context, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(table.null["context"], empty[:1], atol=1e-5, rtol=1e-4)
    if pooled is not None:
        torch.testing.assert_close(rows["pooled"], pooled, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rows["context"][0], rows["context"][1])


def test_chunks_are_kept_by_content(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "CHUNK", 2)
    pipe = shared("sd")
    calls: list[int] = []
    encode = prompts._encode
    monkeypatch.setattr(prompts, "_encode", lambda *a: calls.append(len(a[2])) or encode(*a))
    first = encode_prompts(pipe, MANY, cache=tmp_path)
    assert calls == [1, 2, 2, 1]  # the empty prompt, then three chunks
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    calls.clear()
    again = encode_prompts(pipe, MANY[:4], cache=tmp_path)
    assert calls == [1]
    assert torch.equal(again.everything()["context"], first.everything()["context"][:4])
    assert again.digest != first.digest
    # A damaged chunk is made again; other encoders share nothing.
    next(tmp_path.glob("*.safetensors")).write_bytes(b"broken")
    calls.clear()
    encode_prompts(pipe, MANY, cache=tmp_path)
    assert sorted(calls) in ([1, 1], [1, 2])
    other = copy.copy(pipe)
    other.text_encoder = stirred(copy.deepcopy(pipe.text_encoder), 0.01)
    calls.clear()
    encode_prompts(other, MANY, cache=tmp_path)
    assert calls == [1, 2, 2, 1]


def test_rows_across_chunks_and_the_null(monkeypatch) -> None:
    monkeypatch.setattr(prompts, "CHUNK", 2)
    table = encode_prompts(shared("sd"), MANY, cache=None)
    everything = table.everything()["context"]
    assert everything.shape[0] == 5
    rows = table.rows(torch.tensor([4, 5, 0, 3]))["context"]
    assert torch.equal(rows[[0, 2, 3]], everything[[4, 0, 3]])
    assert torch.equal(rows[1], table.null["context"][0])
    with pytest.raises(IndexError, match=r"numbered 0 to 4 \(5 for none\), got 0 to 6"):
        table.rows(torch.tensor([0, 6]))
    assert copy.deepcopy(table) is table


def prompted(name: str = "sd"):
    table = encode_prompts(shared(name), MANY, cache=None, tokens=tokens(name))
    return with_prompts(from_pipeline(shared(name), init="analytic"), table), table


def test_prompt_numbers_stand_for_embeddings() -> None:
    model, table = prompted()
    rows, x, t = torch.tensor([3, 1]), noises(), torch.tensor([0.2, 0.9])
    model.check(x, prompt=rows)
    with torch.no_grad():
        by_number = model.velocity(x, t, prompt=rows)
        assert torch.equal(by_number, model.velocity(x, t, **table.rows(rows)))
        null = model.null_condition(prompt=rows)
        assert null["prompt"].tolist() == [5, 5]
        assert torch.equal(model.velocity(x, t, **null), model.velocity(x, t))
        guided = ClassifierFreeGuidance(model, 2.0).velocity(x, t, prompt=rows)
    torch.testing.assert_close(guided, model.velocity(x, t).detach() * -1 + 2 * by_number)
    with pytest.raises(ValueError, match=r"prompt must be from 0 to 4 \(5 for none\), got 0 to 6"):
        model.check(x, prompt=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="prompts belong to models of from_pipeline"):
        with_prompts(FlowModel(lambda x, t: x), table)


def test_stores_keep_numbers_and_come_out_the_same(tmp_path) -> None:
    """Invariant 4: the same bytes again, no duplicates on resume, eight bytes a prompt."""
    model, table = prompted()
    guided = ClassifierFreeGuidance(model, 2.0)
    options = {"steps": 2, "shard_size": 4, "seed": 3, "conditions": table, "gate": None}
    store = generate_pairs(model, tmp_path / "a", 6, field=guided, **options)
    assert store.settings.conditions == {"prompt": {"dtype": "int64", "shape": []}}
    again = generate_pairs(model, tmp_path / "b", 6, field=guided, **options)
    assert again.digests == store.digests
    # A shard lost to a kill is made again, and the others stay.
    kept = (tmp_path / "a" / "pairs-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "a" / "pairs-00001.safetensors").unlink()
    (tmp_path / "a" / "store.json").write_text(
        (tmp_path / "b" / "store.json").read_text().replace('"complete": true', '"complete": false')
    )
    resumed = generate_pairs(model, tmp_path / "a", 6, field=guided, **options)
    assert resumed.digests == store.digests
    assert (tmp_path / "a" / "pairs-00000.safetensors").stat().st_mtime_ns == kept
    source, _, condition = resumed.rows(torch.arange(6))
    assert len({float(x.sum()) for x in source}) == 6
    assert condition["prompt"].dtype == torch.int64
    # They train a flow of the same prompts.
    method = FlowMatching(model, StoredPairs(resumed), condition_dropout=0.5)
    assert method.loss(Draw.of(4)).isfinite()
    other = encode_prompts(shared("sd"), ["x", *MANY[1:]], cache=None)
    with pytest.raises(RunExistsError, match="another teacher"):
        generate_pairs(
            with_prompts(model, other), tmp_path / "a", 6, field=guided,
            **{**options, "conditions": other},
        )  # fmt: skip


def test_files_of_prompts(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa fox\n\n  a door  \r\nein Füchslein\n", encoding="utf-8")
    assert read_prompts(file) == read_prompts(f"prompts:{file}") == [
        "a fox", "a door", "ein Füchslein",
    ]  # fmt: skip
    file.write_text("\n  \n")
    with pytest.raises(ValueError, match="holds no prompts: write one a line"):
        read_prompts(file)
    file.write_text("short\n" + "x" * 10_000 + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* has 10000 characters, at most 4000"):
        read_prompts(file)
    with pytest.warns(UserWarning, match=r"1 prompts of .* were cut to 4000 characters"):
        assert [len(p) for p in read_prompts(file, cut=True)] == [5, 4000]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match="one prompt a line"):
        read_prompts(tmp_path / "absent.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write_text("x" * 4000)
        read_prompts(file)


def test_nothing_to_encode() -> None:
    with pytest.raises(ValueError, match="there are no prompts to encode"):
        encode_prompts(shared("sd"), [])
    with pytest.raises(ValueError, match="prompts must be texts, got int"):
        encode_prompts(shared("sd"), [1])
    bare = copy.copy(shared("sd"))
    bare.text_encoder = None
    with pytest.raises(ValueError, match="has no text encoders: load it with them"):
        encode_prompts(bare, PROMPTS)
    model = from_pipeline(bare)
    with pytest.raises(ValueError, match="needs the condition 'context': give encoded prompts"):
        model.velocity(noises(), torch.zeros(2))
