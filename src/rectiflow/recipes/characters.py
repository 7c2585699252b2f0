"""Text that every machine has, and a small transformer that learns it character by character."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

HELD_OUT = 0.1
"""The part of a text, its end, that is not trained on."""


@dataclass(frozen=True, eq=False)
class Characters:
    """A text as numbers.

    Attributes:
        codes: one number a character.
        alphabet: the character of each number.
    """

    codes: Tensor
    alphabet: str

    @classmethod
    def of(cls, text: str) -> Characters:
        """The numbers of a text; the alphabet is what occurs in it.

        Example:
            >>> Characters.of("banana").codes.tolist()
            [1, 0, 2, 0, 2, 0]
        """
        alphabet = "".join(sorted(set(text)))
        places = {character: place for place, character in enumerate(alphabet)}
        return cls(torch.tensor([places[character] for character in text]), alphabet)

    def windows(
        self,
        count: int,
        length: int,
        *,
        held_out: bool = False,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "count letters"]:
        """Stretches from random places: `length` characters to read and the one after.

        Args:
            count: number of stretches.
            length: characters to read in each.
            held_out: from the end of the text that is not trained on, instead of the rest.
            generator: the source of randomness.

        Raises:
            ValueError: a part of the text that is shorter than a stretch.
        """
        border = len(self.codes) - int(HELD_OUT * len(self.codes))
        part = self.codes[border:] if held_out else self.codes[:border]
        places = len(part) - length
        if places < 1:
            raise ValueError(
                f"stretches of {length + 1} characters need a longer text, got {len(part)} in its "
                f"{'held-out' if held_out else 'training'} part"
            )
        first = torch.randint(places, (count, 1), generator=generator)
        return part[first + torch.arange(length + 1)]


@cache
def standard_library(count: int) -> Characters:
    """The first characters of Python's own modules, in the order of their names.

    ASCII only. The text differs a little between versions of Python.

    Args:
        count: number of characters.
    """
    positive("count", count)
    text = ""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="ignore")
        text += "".join(c for c in source if c == "\n" or " " <= c <= "~")
        if len(text) >= count:
            break
    return Characters.of(text[:count])


class CharacterModel(nn.Module):
    """A transformer that predicts the next character: normalised in front of each part, causal.

    Args:
        alphabet: number of characters.
        length: most characters read.
        width: size of a character's vector.
        depth: number of blocks.
        heads: heads of attention.
        seed: of the first weights.

    Example:
        >>> model = CharacterModel(7, length=5, width=8, depth=1, heads=2)
        >>> model(torch.zeros(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 7])
    """

    def __init__(
        self, alphabet: int, *, length: int, width: int, depth: int, heads: int, seed: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.letters = nn.Embedding(alphabet, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    # GPT-2's spread.
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
                elif name.endswith("bias"):
                    p.zero_()

    def forward(self, codes: Int[Tensor, "b length"]) -> Float[Tensor, "b length alphabet"]:
        h = self.letters(codes) + self.places.weight[: codes.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def loss(self, windows: Int[Tensor, "b letters"]) -> Float[Tensor, ""]:
        """The mean cross-entropy of the next characters, in nats."""
        answers = self(windows[:, :-1])
        return functional.cross_entropy(answers.flatten(0, 1), windows[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        b, length, width = h.shape
        q, k, v = self.qkv(self.before(h)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(b, length, width))
        return h + self.outer(functional.gelu(self.inner(self.between(h))))
