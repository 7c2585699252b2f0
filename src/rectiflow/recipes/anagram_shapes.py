"""Shapes with names, a network that attends to their words, and anti-segregation on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent, TensorData
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.flows.sampling import draw_source
from rectiflow.guidance.anagram import Anagram
from rectiflow.guidance.anti_segregation import AntiSegregation, OverlapMeter
from rectiflow.guidance.views import Flip, Identity
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SIDE = 16
SIZES = ("small", "large")
SHAPES = ("disc", "square", "triangle", "cross")
WORDS = (*SIZES, *SHAPES)
PAIRS = tuple(combinations(SHAPES, 2))


@dataclass(frozen=True)
class ShapeSettings:
    """The experiment on attention."""

    images: int = 4000
    """Pictures to train on."""
    net_options: Mapping[str, Any] = field(
        default_factory=lambda: {"depth": 2, "heads": 2, "head_dim": 16, "patch": 2}
    )
    """Arguments of the network, an mmdit."""
    training: TrainerSettings = field(
        default_factory=lambda: stage(1500, batch_size=32, learning_rate=2e-3)
    )
    """Its training."""
    scale: float = 3.0
    """Scale of guidance."""
    steps: int = 30
    """Euler steps."""
    samples: int = 16
    """Samples of each pair of shapes."""
    step_size: float = 5.0
    """Step of anti-segregation."""
    until: float = 0.86
    """Time from which it is off."""


@dataclass(frozen=True)
class Drawn:
    """Shapes sampled with or without anti-segregation.

    Attributes:
        overlap: of attention in the last step, mean over samples.
        away: how far the overlap of samples is from 0.45, the one wanted, in the mean.
        worst: probability of the wanted shape in the worse view, mean over samples.
        images: some samples and their other view.
    """

    overlap: float
    away: float
    worst: float
    images: Tensor


def draw_shapes(
    count: int, *, generator: torch.Generator
) -> tuple[Float[Tensor, "n 1 h w"], Int[Tensor, "n 2"]]:
    """Pictures of one light shape each, anywhere on dark ground, and their two words by number.

    Example:
        >>> images, words = draw_shapes(3, generator=torch.Generator().manual_seed(0))
        >>> images.shape, words.shape
        (torch.Size([3, 1, 16, 16]), torch.Size([3, 2]))
    """
    large = torch.randint(2, (count,), generator=generator)
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    radius = (2.5 + 1.5 * large).view(-1, 1, 1)
    room = SIDE - 1 - 2 * radius.flatten()
    corner = radius.flatten() + room * torch.rand(2, count, generator=generator)
    place = torch.arange(float(SIDE))
    down, right = place[:, None] - corner[0].view(-1, 1, 1), place - corner[1].view(-1, 1, 1)
    # How far outside each shape a pixel is; below zero is inside.
    outside = torch.stack(
        [
            (down.square() + right.square()).sqrt() - radius,
            torch.maximum(down.abs(), right.abs()) - 0.85 * radius,
            torch.maximum(down - 0.8 * radius, 2 * right.abs() - down - 0.9 * radius) / 1.5,
            torch.minimum(
                torch.maximum(down.abs() - radius, right.abs() - 0.3 * radius),
                torch.maximum(right.abs() - radius, down.abs() - 0.3 * radius),
            ),
        ],
        1,
    )
    chosen = outside[torch.arange(count), shape]
    images = 1 - 2 * (chosen + 0.5).clamp(0, 1)
    return images[:, None], torch.stack([large, len(SIZES) + shape], 1)


def embed(words: Int[Tensor, "n 2"]) -> Float[Tensor, "n 2 words"]:
    """The condition of pairs of words: a token each."""
    return torch.nn.functional.one_hot(words, len(WORDS)).float()


class ShapeJudge:
    """The probability of each shape by logistic regression on the spectrum of a picture.

    Magnitudes of frequencies do not depend on where a shape is. It has never seen a sample of the
    generator, nor its attention.
    """

    def __init__(self, images: Float[Tensor, "n 1 h w"], shape: Int[Tensor, " n"]) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._machine = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        self._machine.fit(_spectrum(images), shape.numpy())

    def accuracy(self, images: Float[Tensor, "n 1 h w"], shape: Int[Tensor, " n"]) -> float:
        """The share of pictures that are taken for their shape."""
        return float(self._machine.score(_spectrum(images), shape.numpy()))

    def chance(
        self, images: Float[Tensor, "n 1 h w"], shape: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """The probability that a picture is of a shape."""
        found = torch.from_numpy(self._machine.predict_proba(_spectrum(images))).float()
        return found.gather(1, shape[:, None])[:, 0]


def _spectrum(images: Tensor) -> Any:
    return torch.fft.rfft2(images[:, 0]).abs().flatten(1).log1p().numpy()


def train_shapes(settings: ShapeSettings, seed: int) -> FlowModel:
    """The network that draws a shape from two words."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    images, words = draw_shapes(settings.images, generator=generator)
    start = new_model(
        "mmdit", (1, SIDE, SIDE), seed=seed, context_dim=len(WORDS), **settings.net_options
    )
    data = Independent(TensorData(images, {"context": embed(words)}))
    method = FlowMatching(start, data, condition_dropout=0.1)
    return train(method, replace(settings.training, seed=seed), title=f"shapes, seed {seed}")


def sample_shapes(
    model: FlowModel, judge: ShapeJudge, settings: ShapeSettings, seed: int, *, step_size: float
) -> Drawn:
    """All pairs of shapes, one upright and one upside down, from noises of the seed."""
    first, second = (
        torch.tensor([SHAPES.index(pair[i]) for pair in PAIRS for _ in range(settings.samples)])
        for i in (0, 1)
    )
    texts = [torch.stack([torch.ones_like(s), len(SIZES) + s], 1) for s in (first, second)]
    # The second token of every text is the name of its shape.
    spans = [(1,), (1,)]
    anagram = Anagram(
        model,
        [(Identity(), {"context": embed(texts[0])}), (Flip(), {"context": embed(texts[1])})],
        guide=lambda model: ClassifierFreeGuidance(model, settings.scale),
        steps=settings.steps,
        spans=spans,
        antiseg=step_size,
        until=settings.until,
    )
    generator = torch.Generator().manual_seed(10_000 + seed)
    meter = OverlapMeter(AntiSegregation(spans))
    source = draw_source(model, len(first), generator=generator)
    images = anagram(source=source, correctors=(meter,)).cpu()
    seen = anagram.shown(images)
    chances = [judge.chance(one, shape) for one, shape in zip(seen, (first, second))]
    assert meter.overlap is not None
    overlap = meter.overlap[0].cpu()
    return Drawn(
        float(overlap.mean()),
        float((0.45 - overlap).abs().mean()),
        float(torch.minimum(*chances).mean()),
        torch.stack(seen, 1)[:: settings.samples // min(2, settings.samples)].flatten(0, 1),
    )
