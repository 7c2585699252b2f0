"""A relation in words: two objects, what stands between them, and the sentences about them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rectiflow.guidance.relation_prompts import RelationPrompts
from rectiflow.interop.diffusers.clip_text import ClipText, clip_of
from rectiflow.interop.diffusers.prompt_lengths import check_prompts
from rectiflow.interop.diffusers.prompts import encode_prompts

ALONE = "this is a photo of {}"
KEYS = ("A", "R", "B", "ARB", "BRA")


@dataclass(frozen=True)
class RelationTexts:
    """Words and sentences of a relation.

    Of a word of several tokens the first alone enters the graph, so choose the word of a relation
    that says it (`on` rather than `is placed on`).

    Attributes:
        a: the first object.
        r: the word of the relation.
        b: the second object.
        arb: the sentence "A R B".
        bra: the sentence "B R A".
        alone: the sentence about one object, with `{}` in its place.

    Raises:
        ValueError: an empty word, objects that are the same, a word that is not in a sentence, or
            a sentence about one object without its place.

    Example:
        >>> texts = RelationTexts("fox", "in", "box", "a fox in a box", "a box in a fox")
        >>> texts.with_objects("bee", "jar").sentences[:2]
        ('a bee in a jar', 'a jar in a bee')
    """

    a: str
    r: str
    b: str
    arb: str
    bra: str
    alone: str = ALONE

    def __post_init__(self) -> None:
        named = {"A": self.a, "R": self.r, "B": self.b}
        for name, word in named.items():
            if not word.strip():
                raise ValueError(f"the word {name} of the relation is empty")
        if self.a.casefold() == self.b.casefold():
            raise ValueError(f"the objects A and B are both {self.a!r}: a relation needs two")
        for sentence in (self.arb, self.bra):
            for name, word in named.items():
                if not _word(word).search(sentence):
                    kind = "relation word" if name == "R" else f"object {name}"
                    raise ValueError(f"the {kind} {word!r} is not in the prompt {sentence!r}")
        if self.alone.count("{}") != 1:
            raise ValueError(
                f"the sentence about one object needs {{}} once in its place, got {self.alone!r}"
            )

    @classmethod
    def from_index(
        cls, index: Any, *, alone: str = ALONE, where: str = "the index"
    ) -> RelationTexts:
        """The words of a table `{"A", "R", "B", "ARB", "BRA"}`; other keys are passed over.

        Args:
            index: the table.
            alone: the sentence about one object.
            where: what to call the table in errors.

        Raises:
            ValueError: no table, a key that is missing or no text, and what the words refuse.
        """
        if not isinstance(index, Mapping):
            raise ValueError(f"{where} must hold a table of {', '.join(KEYS)}, got {index!r:.40}")
        for key in KEYS:
            if not isinstance(index.get(key), str):
                wrong = f"got {index[key]!r:.40}" if key in index else "which is missing"
                raise ValueError(f"{where} must give {key!r} as a text, {wrong}")
        return cls(**{key.lower(): index[key] for key in KEYS}, alone=alone)

    @property
    def words(self) -> tuple[str, str, str]:
        """A, R and B."""
        return self.a, self.r, self.b

    @property
    def sentences(self) -> tuple[str, str, str, str]:
        """The prompts, in the order of `PROMPTS`."""
        return self.arb, self.bra, self.alone.format(self.a), self.alone.format(self.b)

    def with_objects(self, a: str, b: str) -> RelationTexts:
        """The same relation between other objects."""
        new = {self.a.strip().casefold(): a, self.b.strip().casefold(): b}
        # In one pass, since a new object may be called as an old one; the longer name first.
        old = sorted((self.a, self.b), key=len, reverse=True)
        pattern = re.compile("|".join(_word(word).pattern for word in old), re.IGNORECASE)
        arb, bra = (
            pattern.sub(lambda found: new[found[0].casefold()], sentence)
            for sentence in (self.arb, self.bra)
        )
        return replace(self, a=a, b=b, arb=arb, bra=bra)

    def facts(self) -> dict[str, str]:
        """The words as plain values, from which `RelationTexts(**facts)` makes them again."""
        return asdict(self)


def encode_relation(pipe: Any, texts: RelationTexts, *, truncate: bool = False) -> RelationPrompts:
    """A relation as the network and the CLIP text encoders of a pipeline see it.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x, XL or 3.
        texts: words and sentences.
        truncate: cut sentences that are longer than a tokenizer takes, instead of refusing them.

    Raises:
        ValueError: a pipeline without a CLIP context, a sentence that is too long, or objects
            whose first tokens are the same.
    """
    clip = clip_of(pipe)
    if not truncate:
        check_prompts(pipe, texts.sentences)
    _distinct(clip, texts)
    table = encode_prompts(pipe, texts.sentences, cache=None)
    return RelationPrompts(
        table.everything(), clip.vectors(texts.words), clip.ends(texts.sentences)
    )


def _distinct(clip: ClipText, texts: RelationTexts) -> None:
    first, _, second = clip.tokens(texts.words)
    if first == second:
        raise ValueError(
            f"{texts.a!r} and {texts.b!r} begin with the same token {first!r}, by which alone a "
            "graph knows them: choose other words"
        )


def _word(word: str) -> re.Pattern[str]:
    """A word as such: not as a part of another one."""
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)
