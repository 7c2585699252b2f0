"""Whether prompts fit the tokenizers of a pipeline, said before anything is cut off."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rectiflow.interop.diffusers.families import family_of_pipeline


def check_prompts(pipe: Any, prompts: Sequence[str], *, tokens: int | None = None) -> None:
    """Refuse prompts of which a text encoder would see the beginning only.

    diffusers cuts them with a warning at most. Every tokenizer counts: CLIP's take 77 tokens,
    T5's as many as the pipeline's `max_sequence_length`.

    Args:
        pipe: the pipeline.
        prompts: the texts.
        tokens: length of T5's part, as given to `encode_prompts`; the pipeline's own by default.

    Raises:
        ValueError: a prompt is longer than one of the tokenizers takes.
    """
    family = family_of_pipeline(pipe)
    if tokens is None:
        known = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
        tokens = known.default if known is not None else None
    last = {"sd3": "_3", "flux": "_2"}.get(family.key)
    for suffix in ("", "_2", "_3"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        if tokenizer is None:
            continue
        most = tokens if suffix == last and tokens is not None else tokenizer.model_max_length
        lengths = map(len, tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
        for prompt, count in zip(prompts, lengths):
            if count > most:
                shown = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
                raise ValueError(
                    f"the prompt {shown!r} has {count} tokens but tokenizer{suffix} of "
                    f"{type(pipe).__name__} takes {most}: shorten it, or pass --truncate to have "
                    "it cut"
                )
