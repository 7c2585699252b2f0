"""Pictures of two coloured squares, a text encoder that forgets their order, and a flow of both.

A sentence is the sum of its words, so "red left of green" and "green left of red" are one vector.
The flow is also shown, in part of its training, a hidden direction that says the true order: it can
place the squares, and only the text never tells it to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rectiflow.flows.couplings import TensorData
from rectiflow.guidance.relation_fitting import RelationExamples
from rectiflow.guidance.relation_prompts import PROMPTS, RelationPrompts

if TYPE_CHECKING:
    from jaxtyping import Float, Int

COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
}
NAMES = tuple(COLOURS)
WORDS = (*NAMES, "left", "photo")
SIDE, SQUARE = 6, 2
SHAPE = (3, SIDE, SIDE)
KEY = "text"
LEFT, RIGHT = 0, SIDE - SQUARE
Pair = tuple[str, str]


def palette() -> Float[Tensor, "colours 3"]:
    """The colours of the squares, in the order of `NAMES`."""
    return torch.tensor(list(COLOURS.values()))


def draw_squares(
    colours: Int[Tensor, " b"],
    columns: Int[Tensor, " b"],
    *,
    onto: Float[Tensor, "b 3 side side"] | None = None,
    generator: torch.Generator,
) -> Float[Tensor, "b 3 side side"]:
    """A square of a colour at a column and a random row of each picture, on black or on others."""
    rows = torch.randint(SIDE - SQUARE + 1, colours.shape, generator=generator)
    pictures = torch.full((len(colours), *SHAPE), -1.0) if onto is None else onto
    places = torch.arange(SIDE)
    down = (places >= rows[:, None]) & (places < rows[:, None] + SQUARE)
    along = (places >= columns[:, None]) & (places < columns[:, None] + SQUARE)
    inside = (down[:, :, None] & along[:, None, :]).unsqueeze(1)
    return torch.where(inside, palette()[colours][:, :, None, None], pictures)


def two_squares(
    left: Int[Tensor, " b"], right: Int[Tensor, " b"], generator: torch.Generator
) -> Float[Tensor, "b 3 side side"]:
    """Pictures with a square of one colour on the left and one of another on the right."""
    pictures = draw_squares(left, torch.full_like(left, LEFT), generator=generator)
    return draw_squares(right, torch.full_like(right, RIGHT), onto=pictures, generator=generator)


def one_square(
    colours: Int[Tensor, " b"], generator: torch.Generator
) -> Float[Tensor, "b 3 side side"]:
    """Pictures with one square, on either side."""
    side = torch.randint(2, colours.shape, generator=generator)
    return draw_squares(colours, side * RIGHT, generator=generator)


def matches(pictures: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b 2 colours"]:
    """How well each half of a picture matches a square of each colour, in the row that fits best.

    A square is matched whatever its brightness.
    """
    templates = palette().to(pictures) + 1
    templates = templates / templates.norm(dim=1, keepdim=True)
    found = []
    for column in (LEFT, RIGHT):
        part = pictures[:, :, :, column : column + SQUARE] + 1
        squares = part.sum(3).unfold(2, SQUARE, 1).sum(3)  # b, 3, row
        found.append(torch.einsum("bcr,kc->bkr", squares, templates).amax(2))
    return torch.stack(found, 1)


def in_order(pictures: Float[Tensor, "b 3 side side"], wanted: Sequence[str]) -> float:
    """The share of pictures that match the wanted order of two colours better than the other one.

    A choice between two: one half is chance, whatever else the pictures show.
    """
    found = matches(pictures)[:, :, [NAMES.index(name) for name in wanted]]
    there, exchanged = found[:, 0, 0] + found[:, 1, 1], found[:, 0, 1] + found[:, 1, 0]
    return float(((there > exchanged).float() + 0.5 * (there == exchanged).float()).mean())


def as_told(pictures: Float[Tensor, "b 3 side side"], wanted: Sequence[str]) -> float:
    """The share of pictures whose halves match the wanted colours best of all colours."""
    order = torch.tensor([NAMES.index(name) for name in wanted], device=pictures.device)
    return float((matches(pictures).argmax(2) == order).all(1).float().mean())


@dataclass(frozen=True, eq=False)
class Language:
    """Word vectors, and the hidden direction in which a sentence could say an order.

    Attributes:
        words: a vector for each of `WORDS`.
        order: the direction; its sign says whether the earlier one of `NAMES` is on the left.
    """

    words: Tensor
    order: Tensor

    @classmethod
    def of(cls, width: int, strength: float, seed: int) -> Language:
        """A language of random words; `strength` is the length of the direction."""
        generator = torch.Generator().manual_seed(seed)
        words = torch.randn(len(WORDS), width, generator=generator) / 2
        order = torch.randn(width, generator=generator)
        return cls(words, strength * order / order.norm())

    def word(self, name: str) -> Float[Tensor, " width"]:
        """The vector of a word."""
        return self.words[WORDS.index(name)]

    def pairs(
        self, one: Int[Tensor, " b"], other: Int[Tensor, " b"], sign: Float[Tensor, " b"]
    ) -> Float[Tensor, "b width"]:
        """Sentences about two colours; with sign 0 they do not say which is on the left."""
        both = self.words[one] + self.words[other] + self.word("left")
        return both + sign[:, None] * self.order

    def alone(self, colour: Int[Tensor, " b"]) -> Float[Tensor, "b width"]:
        """Sentences about one colour."""
        return self.words[colour] + self.word("photo")

    def prompts(self, pair: Pair) -> RelationPrompts:
        """The prompts about two colours, as the text encoder gives them."""
        one, other = (torch.tensor([NAMES.index(name)]) for name in pair)
        silent = torch.zeros(1)
        ends = [
            self.pairs(one, other, silent),
            self.pairs(other, one, silent),
            self.alone(one),
            self.alone(other),
        ]
        words = torch.stack([self.word(pair[0]), self.word("left"), self.word(pair[1])])
        return RelationPrompts({KEY: torch.cat(ends)}, words, key=KEY)

    def told(self, pair: Pair) -> Float[Tensor, "2 width"]:
        """Both sentences about two colours with the true order in them: the oracle's."""
        one, other = (torch.tensor([NAMES.index(name)] * 2) for name in pair)
        first = 1.0 if NAMES.index(pair[0]) < NAMES.index(pair[1]) else -1.0
        return self.pairs(one, other, torch.tensor([first, -first]))


def scenes(
    language: Language,
    count: int,
    *,
    single: float = 0.2,
    told: float = 0.7,
    seed: int = 0,
) -> TensorData:
    """Pictures with their sentences, for training the flow.

    Args:
        language: the words.
        count: pictures.
        single: share of pictures of one square.
        told: share of sentences about two squares that say the order.
        seed: of the pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    alone = int(single * count)
    one = torch.randint(len(NAMES), (count - alone,), generator=generator)
    step = torch.randint(1, len(NAMES), one.shape, generator=generator)
    other = (one + step) % len(NAMES)
    said = torch.rand(one.shape, generator=generator) < told
    sign = torch.where(one < other, 1.0, -1.0) * said
    colour = torch.randint(len(NAMES), (alone,), generator=generator)
    pictures = [two_squares(one, other, generator), one_square(colour, generator)]
    texts = [language.pairs(one, other, sign), language.alone(colour)]
    return TensorData(torch.cat(pictures), {KEY: torch.cat(texts)})


def examples(language: Language, pair: Pair, count: int, *, seed: int) -> RelationExamples:
    """A few pictures of each prompt about two colours."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.full((count,), NAMES.index(name)) for name in pair)
    pictures = (
        two_squares(one, other, generator),
        two_squares(other, one, generator),
        one_square(one, generator),
        one_square(other, generator),
    )
    return RelationExamples(language.prompts(pair), dict(zip(PROMPTS, pictures)))


class SceneNet(nn.Module):
    """A multilayer perceptron of picture, time and sentence that predicts velocities.

    Inside it estimates the picture, which a sentence tells more directly than a velocity: the
    estimate D makes the velocity `(D - x) / (1.05 - t)`, which stays finite.
    """

    def __init__(self, width: int, depth: int, text: int, waves: int = 8) -> None:
        super().__init__()
        size = 3 * SIDE * SIDE
        self.register_buffer("rates", math.pi * torch.arange(waves), persistent=False)
        self.stem = nn.Linear(size + 2 * waves, width)
        self.told = nn.Linear(text + 2 * waves, depth * width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, size)

    @property
    def conditional(self) -> bool:
        """True: it takes a sentence."""
        return True

    def forward(
        self, x: Float[Tensor, "b 3 side side"], t: Float[Tensor, " b"], *, text: Tensor
    ) -> Float[Tensor, "b 3 side side"]:
        phase = t[:, None] * self.get_buffer("rates")
        time = torch.cat([phase.cos(), phase.sin()], 1)
        h = self.stem(torch.cat([x.flatten(1), time], 1))
        told = self.told(torch.cat([text, time], 1)).chunk(len(self.blocks), 1)
        for block, words in zip(self.blocks, told):
            h = h + block(nn.functional.silu(h + words))
        estimate = self.head(nn.functional.silu(h)).view_as(x)
        return (estimate - x) / (1.05 - t)[:, None, None, None]
