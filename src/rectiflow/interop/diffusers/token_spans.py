"""Where the words of a concept stand among the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rectiflow.interop.diffusers.families import family_of_pipeline


def concept_tokens(pipe: Any, prompt: str, concept: str) -> tuple[int, ...]:
    """Positions of a concept in the condition `context` of a prompt.

    Words are found by their token ids and not by counting, so styles, articles and words of
    several tokens do not matter. Where a concept is named several times the last one counts.
    Stable Diffusion 3 reads the prompt twice, by CLIP and T5: its positions are those of both.

    Args:
        pipe: the pipeline.
        prompt: the text.
        concept: some of its words, in their order.

    Raises:
        ValueError: the concept is not in the prompt, or only beyond what the tokenizer takes.
    """
    family = family_of_pipeline(pipe)
    tokenizers = {
        "sd3": (pipe.tokenizer, getattr(pipe, "tokenizer_3", None)),
        "flux": (getattr(pipe, "tokenizer_2", None),),
    }.get(family.key, (pipe.tokenizer,))
    found: list[int] = []
    start = 0
    for tokenizer in tokenizers:
        if tokenizer is None:
            continue
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        wanted = tokenizer(concept, add_special_tokens=False).input_ids
        place = _last(ids, wanted)
        if place is None or place + len(wanted) > tokenizer.model_max_length:
            raise ValueError(
                f"the concept {concept!r} is not in the prompt {prompt!r}: name words of it"
            )
        found += range(start + place, start + place + len(wanted))
        start += tokenizer.model_max_length
    return tuple(found)


def _last(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where a run of ids begins, the last one if there are several."""
    size = len(wanted)
    starts = range(len(ids) - size, -1, -1) if size else ()
    return next((at for at in starts if list(ids[at : at + size]) == list(wanted)), None)
