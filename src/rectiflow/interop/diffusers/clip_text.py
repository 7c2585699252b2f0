"""The CLIP part of a pipeline's context: word vectors, and where sentences end in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.interop.diffusers.families import family_of_pipeline

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

SUFFIXES = {"sd": ("",), "sdxl": ("", "_2"), "sd3": ("", "_2")}
"""Family: its encoders whose outputs lie side by side in the first channels of the context."""


@dataclass(frozen=True, eq=False)
class ClipText:
    """The contrastive text encoders that a pipeline's context begins with.

    Made by `clip_of`. Word vectors of several encoders lie side by side, as their outputs do in
    the context.

    Attributes:
        tokenizers: of the encoders.
        encoders: in the order of their channels.
    """

    tokenizers: tuple[Any, ...]
    encoders: tuple[Any, ...]

    @property
    def width(self) -> int:
        """Channels of the context that come from these encoders."""
        return sum(int(one.config.hidden_size) for one in self.encoders)

    def tokens(self, words: Sequence[str]) -> list[str]:
        """The first token of each word, as the tokenizer writes it; it alone stands for the word.

        Raises:
            ValueError: a word without tokens.
        """
        first = self.tokenizers[0]
        return [str(first.convert_ids_to_tokens(self._first(first, word))) for word in words]

    @torch.no_grad()
    def vectors(self, words: Sequence[str]) -> Float[Tensor, "words width"]:
        """The input embeddings of the words' first tokens: no context, no position.

        Raises:
            ValueError: a word without tokens.
        """
        parts = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            table = encoder.get_input_embeddings().weight
            rows = torch.tensor([self._first(tokenizer, word) for word in words])
            parts.append(table[rows.to(table.device)].float().cpu())
        return torch.cat(parts, 1)

    def ends(self, prompts: Sequence[str]) -> Int[Tensor, " prompts"]:
        """At which token each prompt ends; a prompt that is cut ends with the last one.

        Raises:
            ValueError: tokenizers that disagree about it.
        """
        found = []
        for tokenizer in self.tokenizers:
            ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
            found.append([min(len(row), tokenizer.model_max_length) - 1 for row in ids])
        if any(row != found[0] for row in found):
            raise ValueError("the tokenizers of the pipeline disagree about where prompts end")
        return torch.tensor(found[0])

    @staticmethod
    def _first(tokenizer: Any, word: str) -> int:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise ValueError(f"the word {word!r} has no tokens: write it in letters")
        return int(ids[0])


def clip_of(pipe: Any) -> ClipText:
    """The contrastive text encoders of a pipeline.

    Of Stable Diffusion 3, T5's part of the context is left out: nothing contrastive made it. What
    reaches a network as a pooled vector alone has no end-of-text token either: SDXL's and Stable
    Diffusion 3's pooled vectors stay as they are, and FLUX, whose context is T5's, is refused.

    Raises:
        ValueError: a family whose context has no such part, or a pipeline without its encoders.

    Source: arXiv 2403.20249, section 4.1.
    """
    family = family_of_pipeline(pipe)
    if family.key not in SUFFIXES:
        raise ValueError(
            f"the context of {family.pipeline} is T5's, and CLIP reaches it as a pooled vector "
            "only: relations need a CLIP text encoder with an end-of-text token, as in Stable "
            "Diffusion 1.x, 2.x, XL and 3"
        )
    parts: dict[str, list[Any]] = {"tokenizer": [], "text_encoder": []}
    for suffix in SUFFIXES[family.key]:
        for name, found in parts.items():
            part = getattr(pipe, name + suffix, None)
            if part is None:
                raise ValueError(f"this {family.pipeline} has no {name}{suffix}: load it with it")
            found.append(part)
    return ClipText(tuple(parts["tokenizer"]), tuple(parts["text_encoder"]))
