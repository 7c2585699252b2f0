"""What the prompts of a relation are to a model: conditions, ends of sentences, word vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PROMPTS = ("ARB", "BRA", "A", "B")
"""The prompts of a relation R: A R B, the same with objects exchanged, and each object alone."""


@dataclass(frozen=True, eq=False)
class RelationPrompts:
    """The prompts `PROMPTS` of one relation as a model and a graph see them.

    Attributes:
        condition: the model's condition, four rows each.
        words: vectors of the words A, R and B, without context.
        ends: at which token of `condition[key]` each prompt ends; None where that is one vector a
            prompt and no sequence.
        key: the part of the condition that a graph may shift.

    Raises:
        ValueError: parts that do not fit together.
    """

    condition: Mapping[str, Tensor]
    words: Tensor
    ends: Tensor | None = None
    key: str = "context"

    def __post_init__(self) -> None:
        if self.key not in self.condition:
            raise ValueError(
                f"the condition has no {self.key!r} to shift, only {', '.join(self.condition)}"
            )
        for name, value in self.condition.items():
            if value.shape[0] != len(PROMPTS):
                raise ValueError(
                    f"the condition {name!r} needs a row for each of {', '.join(PROMPTS)}, got "
                    f"shape {tuple(value.shape)}"
                )
        value = self.condition[self.key]
        if self.words.ndim != 2 or self.words.shape[0] != 3:
            raise ValueError(f"words are three vectors (A, R, B), got {tuple(self.words.shape)}")
        if value.ndim != (2 if self.ends is None else 3) or value.shape[-1] < self.width:
            raise ValueError(
                f"the condition {self.key!r} must be "
                f"{'one vector' if self.ends is None else 'a sequence of vectors'} a prompt, of at "
                f"least the {self.width} numbers of a word, got shape {tuple(value.shape)}"
            )

    @property
    def width(self) -> int:
        """Numbers of a word's vector; a sentence's end may have more, which stay as they are."""
        return int(self.words.shape[1])

    def end_vectors(self) -> Float[Tensor, "4 width"]:
        """The vectors at which the prompts end."""
        value = self.condition[self.key]
        if self.ends is not None:
            value = value[torch.arange(len(PROMPTS)), self.ends.to(value.device)]
        return value[:, : self.width]

    def nodes(self) -> Float[Tensor, "2 5 width"]:
        """The nodes of two graphs, in the order of `ROLES`: A R B, and B R A."""
        ends = self.end_vectors()
        a, r, b = self.words.to(ends)
        forward = torch.stack([a, r, b, ends[2], ends[0]])
        backward = torch.stack([b, r, a, ends[3], ends[1]])
        return torch.stack([forward, backward])

    def rows(self, indices: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """The condition of the given prompts for a `RelationRectifier`: `relation` numbers them."""
        found = {
            name: value[indices.to(value.device)].to(indices.device)
            for name, value in self.condition.items()
        }
        return {**found, "relation": indices}


@dataclass(frozen=True, eq=False)
class RelationShifts:
    """What is added to the end of each of several prompts.

    Attributes:
        deltas: a vector a prompt.
        ends: at which token each prompt ends; None for conditions that are one vector.
        key: the part of the condition they belong to.
    """

    deltas: Tensor
    ends: Tensor | None = None
    key: str = "context"

    def __len__(self) -> int:
        return self.deltas.shape[0]

    def added(
        self, value: Float[Tensor, "b *rows"], relation: Int[Tensor, " b"], weight: float = 1.0
    ) -> Float[Tensor, "b *rows"]:
        """A copy of a condition with `weight` times the delta of its prompt at its end.

        Args:
            value: the part `key` of the condition.
            relation: number of each row's prompt; the number of prompts for none.
            weight: how much of the delta.
        """
        none = self.deltas.new_zeros(1, self.deltas.shape[1])
        delta = weight * torch.cat([self.deltas, none]).to(value)[relation]
        ends = None
        if self.ends is not None:
            ends = torch.cat([self.ends, self.ends.new_zeros(1)]).to(relation.device)[relation]
        return shift_ends(value, ends, delta)


def shift_ends(
    value: Float[Tensor, "b *rows"],
    ends: Int[Tensor, " b"] | None,
    delta: Float[Tensor, "b width"],
) -> Float[Tensor, "b *rows"]:
    """A copy of a condition with a vector added to one token of each row, and to nothing else.

    Args:
        value: sequences `(b, tokens, channels)`, or vectors `(b, channels)` where `ends` is None.
        ends: the token of each row.
        delta: what is added, to the first channels if it is shorter.

    Example:
        >>> shift_ends(torch.zeros(1, 3, 2), torch.tensor([1]), torch.ones(1, 1))
        tensor([[[0., 0.],
                 [1., 0.],
                 [0., 0.]]])
    """
    found, width = value.clone(), delta.shape[1]
    if ends is None:
        found[:, :width] += delta
    else:
        found[torch.arange(len(value), device=value.device), ends, :width] += delta
    return found
