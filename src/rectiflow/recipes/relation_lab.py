"""The bench of relations: one language and one flow a seed, rectifiers fitted and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.guidance import (
    ConditionRectifier,
    PairContrastiveDenoising,
    RelationalGraphAttention,
    RelationFitting,
    RelationRectifier,
    directed_relation,
    fit_relation,
    symmetric_relation,
)
from rectiflow.guidance.relation_graph import GraphBuilder
from rectiflow.recipes.relation_scenes import (
    KEY,
    SHAPE,
    Language,
    Pair,
    SceneNet,
    as_told,
    examples,
    in_order,
    scenes,
)
from rectiflow.recipes.tools import stage, train
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.trainer import TrainerSettings
from rectiflow.vectors import cosine, norm

Judge = Callable[[Tensor, Sequence[str]], float]

FULL, POSITIVE, SYMMETRIC = "rectifier", "without the negative term", "without direction"
ARMS: dict[str, tuple[bool, GraphBuilder]] = {
    FULL: (True, directed_relation),
    POSITIVE: (False, directed_relation),
    SYMMETRIC: (True, symmetric_relation),
}
"""Arm: whether exchanged pictures push, and the graph."""


@dataclass(frozen=True)
class Settings:
    """The flow, the rectifiers and how they are judged."""

    text: int = 32
    """Numbers of a word's vector."""
    strength: float = 3.0
    """Length of the hidden direction that says an order."""
    pictures: int = 20_000
    """Pictures that the flow is trained on."""
    width: int = 256
    """Width of the flow's network."""
    depth: int = 2
    """Its hidden layers."""
    flow: TrainerSettings = field(default_factory=lambda: stage(4000, learning_rate=3e-3))
    """Training of the flow."""
    least_oracle: float = 0.9
    """Share of right pictures that the flow must reach when told the order, or it is refused."""
    pairs: tuple[Pair, ...] = (("red", "green"), ("blue", "yellow"))
    """Pairs of colours, each with a rectifier of its own; the next one is what it never saw."""
    few: int = 4
    """Pictures of each prompt."""
    hidden: int = 64
    """Width of the graph network."""
    iterations: int = 60
    """Iterations, of five steps each."""
    batch_size: int = 16
    """Pairs of pictures in a step."""
    learning_rate: float = 1.2e-3
    """Rate of AdamW."""
    lambda_pos: float = 10.0
    """Weight of each prompt's loss on its own picture."""
    lambda_neg: float = 2.0
    """Weight of what is taken off for its loss on the other's."""
    weights: tuple[float, ...] = (0.4, 0.8, 1.0)
    """Weights of the shift; 0 is the frozen model."""
    samples: int = 200
    """Pictures of each prompt for each accuracy."""
    steps: int = 30
    """Steps of the sampler."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of words, flow, pictures and rectifiers."""


@dataclass(frozen=True)
class Fitted:
    """What one arm gave for one pair of colours.

    Attributes:
        accuracy: by weight, of both prompts.
        best: the weight that is best on other noises than these.
        unseen: accuracy of both prompts of colours it was not fitted on, at the best weight.
        unseen_frozen: that of the frozen model on them.
        lengths: length of the shift of each prompt.
        ends: length of what is shifted, of each prompt.
        shown: share of both prompts' pictures with both squares where they belong, at the best
            weight.
        cosine: of both sentences' ends at the best weight.
        images: some pictures of both prompts at the best weight.
    """

    accuracy: dict[float, tuple[float, float]]
    best: float
    unseen: tuple[float, float]
    unseen_frozen: tuple[float, float]
    lengths: tuple[float, ...]
    ends: tuple[float, ...]
    shown: tuple[float, float]
    cosine: float
    images: Tensor


@dataclass(frozen=True)
class Found:
    """What one seed gave, one entry a pair of colours.

    Attributes:
        oracle: share of both prompts' pictures with both squares where they belong, when the order
            is told.
        arms: arm to what it gave.
    """

    oracle: list[tuple[float, float]]
    arms: dict[str, list[Fitted]]


class Lab:
    """The experiments of one seed."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.language = Language.of(settings.text, settings.strength, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SceneNet(settings.width, settings.depth, settings.text)
        sampling = {"solver": "euler", "steps": settings.steps}
        start = FlowModel(net, shape=SHAPE, sampling=sampling)
        shown = Independent(scenes(self.language, settings.pictures, seed=seed))
        flow = replace(settings.flow, seed=seed)
        self.flow = train(FlowMatching(start, shown), flow, title="flow")

    def oracle(self) -> list[tuple[float, float]]:
        """The share of pictures with both squares where they belong, when the order is told.

        Raises:
            ValueError: the flow does not obey even then, so that nothing could be concluded.
        """
        found = []
        for pair in self.settings.pairs:
            told = self.language.told(pair)
            images = self._images(told, self.flow, seed=self.seed)
            found.append(_accuracy(images, pair, as_told))
            least = self.settings.least_oracle
            if sum(found[-1]) / 2 < least:
                raise ValueError(
                    f"told which of {' and '.join(pair)} is on the left, the flow obeys in "
                    f"{sum(found[-1]) / 2:.0%} of its pictures where {least:.0%} are needed: train "
                    "it longer (flow.steps), or a rectifier cannot be judged"
                )
        return found

    def fitted(self, arm: str) -> list[Fitted]:
        """What an arm gives for each pair of colours."""
        pairs = self.settings.pairs
        return [
            self._fitted(arm, pair, pairs[(place + 1) % len(pairs)])
            for place, pair in enumerate(pairs)
        ]

    def _fitted(self, arm: str, pair: Pair, unseen: Pair) -> Fitted:
        settings = self.settings
        rectifier = self._fit(arm, pair)
        weights = (0.0, *settings.weights)
        images = {w: self._of(rectifier, pair, w, seed=self.seed) for w in weights}
        # Chosen on other noises than the accuracy that is reported.
        other = {
            w: _accuracy(self._of(rectifier, pair, w, seed=self.seed + 5000), pair)
            for w in settings.weights
        }
        best = max(other, key=lambda w: sum(other[w]))
        prompts = self.language.prompts(pair)
        with torch.no_grad():
            deltas = rectifier.shifts(prompts).deltas.cpu()
        ends = prompts.end_vectors()
        moved = ends + best * deltas
        apart = [self._of(rectifier, unseen, w, seed=self.seed) for w in (best, 0.0)]
        return Fitted(
            accuracy={w: _accuracy(x, pair) for w, x in images.items()},
            best=best,
            unseen=_accuracy(apart[0], unseen),
            unseen_frozen=_accuracy(apart[1], unseen),
            lengths=tuple(norm(deltas).tolist()),
            ends=tuple(norm(ends).tolist()),
            shown=_accuracy(images[best], pair, as_told),
            cosine=float(cosine(moved[:1], moved[1:2])),
            images=images[best].unflatten(0, (2, -1))[:, :8].flatten(0, 1).cpu(),
        )

    def _fit(self, arm: str, pair: Pair) -> ConditionRectifier:
        settings = self.settings
        pushed, graph = ARMS[arm]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = RelationalGraphAttention(settings.text, hidden=settings.hidden)
        method = RelationFitting(
            self.flow,
            ConditionRectifier(net, graph),
            examples(self.language, pair, settings.few, seed=self.seed + 1000),
            PairContrastiveDenoising(settings.lambda_pos, settings.lambda_neg if pushed else 0.0),
        )
        optim = OptimizerSettings("adamw", settings.learning_rate, weight_decay=0.01, clip_norm=0.0)
        training = TrainerSettings(
            steps=settings.iterations * len(method.pairings),
            batch_size=settings.batch_size,
            ema=0.0,
            seed=self.seed,
            optim=optim,
        )
        return fit_relation(method, training, title=f"{arm}, {' and '.join(pair)}").eval()

    def _of(self, rectifier: ConditionRectifier, pair: Pair, weight: float, *, seed: int) -> Tensor:
        """Pictures of both prompts under a rectifier."""
        prompts = self.language.prompts(pair)
        with torch.no_grad():
            model = RelationRectifier(self.flow, rectifier.shifts(prompts), weight)
        return self._images(prompts.end_vectors()[:2], model, seed=seed, relation=torch.arange(2))

    def _images(self, texts: Tensor, model: object, *, seed: int, **more: Tensor) -> Tensor:
        """Pictures of two texts, half of them each, each from noises of its own."""
        count, device = self.settings.samples, device_of(self.flow)
        generator = torch.Generator().manual_seed(10_000 + seed)
        noises = draw_source(self.flow, 2 * count, generator=generator)
        condition = {KEY: texts, **more}
        return sample(
            self.flow,
            source=noises,
            field=model,
            **{name: v.repeat_interleave(count, 0).to(device) for name, v in condition.items()},
        )


def _accuracy(images: Tensor, pair: Pair, judge: Judge = in_order) -> tuple[float, float]:
    """What a judge says of the pictures of both prompts."""
    one, other = images.chunk(2)
    return judge(one, pair), judge(other, pair[::-1])
