"""Relations in words, and what the CLIP text encoders of pipelines make of them."""

from __future__ import annotations

import pytest
import torch
from tests.interop.pipelines import sdxl, shared

from rectiflow.guidance import RelationTexts, encode_relation
from rectiflow.interop.diffusers import clip_of, encode_prompts

TEXTS = RelationTexts("fox", "in", "box", "a fox in a box", "a box in a fox", "a {}")
FAMILIES = pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])


def test_sentences_are_in_the_order_of_the_prompts() -> None:
    assert TEXTS.sentences == ("a fox in a box", "a box in a fox", "a fox", "a box")
    assert TEXTS.words == ("fox", "in", "box")
    assert RelationTexts(**TEXTS.facts()) == TEXTS


def test_other_objects_take_the_places_of_the_old_ones_at_once() -> None:
    assert TEXTS.with_objects("box", "fox").sentences[:2] == ("a box in a fox", "a fox in a box")
    upper = RelationTexts("fox", "in", "red fox", "A Fox in a Red Fox", "a red fox in a fox")
    found = upper.with_objects("bee", "jar")
    assert found.sentences[:2] == ("A bee in a jar", "a jar in a bee")
    # Words inside of other words are not meant.
    other = RelationTexts("cat", "in", "box", "cat in box, catalogue", "box in cat, catalogue")
    assert other.with_objects("dog", "bag").arb == "dog in bag, catalogue"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": "inside"}, "the relation word 'inside' is not in the prompt 'a fox in a box'"),
        ({"r": "o"}, "the relation word 'o' is not in the prompt"),
        ({"a": "wolf"}, "the object A 'wolf' is not in the prompt"),
        ({"bra": "a fox in a fox"}, "the object B 'box' is not in the prompt 'a fox in a fox'"),
        ({"b": "Fox"}, "the objects A and B are both 'fox'"),
        ({"r": " "}, "the word R of the relation is empty"),
        ({"alone": "a thing"}, "needs {} once in its place, got 'a thing'"),
    ],
)
def test_wrong_words(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        RelationTexts(**{**TEXTS.facts(), **change})


@pytest.mark.parametrize(
    "index, message",
    [
        ([1], r"index.json must hold a table of A, R, B, ARB, BRA, got \[1\]"),
        ({"A": "fox"}, "index.json must give 'R' as a text, which is missing"),
        ({"A": "fox", "R": 3}, "index.json must give 'R' as a text, got 3"),
    ],
)
def test_wrong_indices(index, message) -> None:
    with pytest.raises(ValueError, match=message):
        RelationTexts.from_index(index, where="index.json")


@FAMILIES
def test_prompts_are_the_pipelines_context_its_word_embeddings_and_ends(name: str) -> None:
    pipe = shared(name)
    found = encode_relation(pipe, TEXTS)
    table = encode_prompts(pipe, TEXTS.sentences, cache=None).everything()
    assert found.condition.keys() == table.keys()
    assert all(torch.equal(found.condition[key], value) for key, value in table.items())
    # One token a letter, and a beginning: "a fox in a box" has 10 letters.
    assert found.ends is not None
    assert found.ends.tolist() == [11, 11, 5, 5]
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if name != "sd" else [])]
    # The letter begins its word, so the token is the one of a letter that goes on.
    vocabulary = pipe.tokenizer.get_vocab()
    rows = [vocabulary[letter] for letter in "fib"]
    wanted = [encoder.get_input_embeddings().weight[rows].detach() for encoder in encoders]
    assert torch.equal(found.words, torch.cat(wanted, 1))
    assert clip_of(pipe).tokens(TEXTS.words) == ["f", "i", "b"]


@FAMILIES
def test_ends_are_where_the_encoder_reads_the_end_of_text(name: str) -> None:
    pipe = shared(name)
    found = encode_relation(pipe, TEXTS)
    assert found.ends is not None
    for prompt, end in zip(TEXTS.sentences, found.ends.tolist()):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=16).input_ids
        assert ids[end] == pipe.tokenizer.eos_token_id
        assert pipe.tokenizer.eos_token_id not in ids[:end]


def test_ends_of_stable_diffusion_are_the_encoders_own() -> None:
    pipe = shared("sd")
    ids = pipe.tokenizer(
        list(TEXTS.sentences), padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        pooled = pipe.text_encoder(ids).pooler_output
    torch.testing.assert_close(encode_relation(pipe, TEXTS).end_vectors(), pooled)


def test_pipelines_without_a_clip_context_are_refused() -> None:
    with pytest.raises(ValueError, match="the context of FluxPipeline is T5's, and CLIP reaches"):
        encode_relation(shared("flux"), TEXTS)
    pipe = sdxl()
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="has no text_encoder: load it with it"):
        clip_of(pipe)


def test_long_prompts_and_like_objects_are_refused() -> None:
    pipe = shared("sd")
    long = RelationTexts("fox", "in", "box", "a fox is in the blue box", "a box in a fox", "a {}")
    with pytest.raises(ValueError, match="has 20 tokens but tokenizer of"):
        encode_relation(pipe, long)
    ends = encode_relation(pipe, long, truncate=True).ends
    assert ends is not None
    assert ends.tolist()[0] == 15
    alike = RelationTexts("fox", "in", "fog", "fox in fog", "fog in fox", "a {}")
    with pytest.raises(ValueError, match="'fox' and 'fog' begin with the same token 'f'"):
        encode_relation(pipe, alike)
