"""The bench on which rewards and methods of alignment meet: labelled images and one flow a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rectiflow.align import (
    AlignProp,
    Fixed,
    LastK,
    Normal,
    Reinforce,
    RewardCurve,
    Uniform,
    measure,
    peak_bytes,
)
from rectiflow.align.method import RewardMethod
from rectiflow.align.rewards import Brightness, Classifier, fit_linear
from rectiflow.flows.couplings import Draw, Independent, TensorData
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.nets import sizes
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.trainer import Trainer, TrainerSettings

BEFORE, LAST, NORMAL, UNIFORM, FULL = "before", "last step", "normal", "uniform", "all steps"
POLICY, POLICY_MORE = "REINFORCE, as many images", "REINFORCE, more images"
RULES: Mapping[str, Any] = {LAST: LastK(1), NORMAL: Normal(), UNIFORM: Uniform(), FULL: Fixed(0)}
REWARD, HELD_OUT = "reward", "reward, held-out classes"
JUDGE, DIVERSITY = "share judged to be the next class", "mean distance of two images"


def _optimizer(rate: float = 1e-3) -> OptimizerSettings:
    return OptimizerSettings(name="adamw", learning_rate=rate, weight_decay=1e-4, clip_norm=1.0)


@dataclass(frozen=True)
class Settings:
    """The flow, the chains and the budgets."""

    data: str = "digits"
    """Labelled images, by spec string."""
    net: str = "mlp"
    """The network of the flow."""
    net_options: Mapping[str, Any] = field(default_factory=lambda: {"width": 256, "depth": 2})
    """Its arguments."""
    flow: TrainerSettings = field(default_factory=lambda: stage(3000))
    """Training of the flow."""
    held_out: tuple[int, ...] = (2, 5, 8)
    """Classes that alignment never asks for."""
    chain: int = 20
    """Steps of a chain."""
    updates: int = 40
    """Updates of reward backpropagation."""
    batch_size: int = 64
    """Images of an update."""
    learning_rate: float = 1e-3
    """Its rate."""
    policy_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Rates of the policy gradient; the best one of each seed counts."""
    policy_factor: int = 10
    """How many times more images the longer policy gradient gets."""
    rank: int = 4
    """Rank of the adapters."""
    samples: int = 500
    """Images for each score."""
    memory_net: str = "unet-xs"
    """Size preset whose memory is measured."""
    memory_steps: tuple[int, int] = (10, 40)
    """Steps of its chains."""
    memory_batch: int = 4
    """Images of its chains."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of flows, adapters, noises and batches."""


@dataclass(frozen=True)
class Arm:
    """What one alignment gave.

    Attributes:
        scores: quantity to number.
        curve: mean reward of the training samples by update.
        images: some samples.
    """

    scores: dict[str, float]
    curve: list[float]
    images: Tensor


@dataclass(frozen=True)
class Found:
    """What one seed gave.

    Attributes:
        meaning: by arm, for the reward of meaning.
        colour: by arm, the reward of colour.
        difference: largest difference of gradients with and without checkpoints.
        memory: peak bytes, with and without checkpoints, in few and many steps.
    """

    meaning: dict[str, Arm]
    colour: dict[str, float]
    difference: float
    memory: dict[bool, tuple[int, int]]


class Lab:
    """The experiments of one seed."""

    def __init__(self, settings: Settings, images: ImageData, judge: Any, seed: int) -> None:
        self.settings, self.seed = settings, seed
        classes = len(images.classes)
        start = new_model(
            settings.net, images.shape, seed=seed, classes=classes, **settings.net_options
        )
        flow = replace(settings.flow, seed=seed)
        self.flow = train(FlowMatching(start, Independent(images)), flow, title="flow")
        self.device = device_of(self.flow)
        self.linear, self.judge = fit_linear(images).to(self.device), judge.to(self.device)
        seen = torch.tensor([c for c in range(classes) if c not in settings.held_out])
        self.seen = TensorData(seen, {"label": seen})
        # Other noises than those of the training.
        generator = torch.Generator().manual_seed(10_000 + seed)
        self.source = draw_source(self.flow, settings.samples, generator=generator)
        self.reward = Classifier(self.linear, shift=1)

    def meaning(self) -> dict[str, Arm]:
        """Every rule of truncation and both policy gradients, for the reward of meaning."""
        settings = self.settings
        arms = {BEFORE: self._arm(self.flow, "euler", [])}
        for name, rule in RULES.items():
            method = self._backpropagation(self.reward, rule)
            arms[name] = self._arm(*self._fit(method, settings.updates, settings.learning_rate))
        for name, factor in ((POLICY, 1), (POLICY_MORE, settings.policy_factor)):
            tried = []
            for rate in settings.policy_rates:
                policy = Reinforce(self.flow, self.reward, steps=settings.chain, rank=settings.rank,
                    conditions=self.seen, checkpoint=False, seed=self.seed)  # fmt: skip
                model, _, curve = self._fit(policy, factor * settings.updates, rate)
                # It is trained on the stochastic sampler and judged by whichever suits it.
                tried += [self._arm(model, solver, curve) for solver in ("sde", "euler")]
            arms[name] = max(tried, key=lambda arm: arm.scores[REWARD])
        return arms

    def colour(self) -> dict[str, float]:
        """The reward of colour under three rules."""
        reward, settings = Brightness(0.0), self.settings
        found = {BEFORE: self._score(self.flow, reward)}
        for name in (LAST, NORMAL, UNIFORM):
            method = self._backpropagation(reward, RULES[name])
            model, *_ = self._fit(method, settings.updates, settings.learning_rate)
            found[name] = self._score(model, reward)
        return found

    def checkpoints(self) -> tuple[float, dict[bool, tuple[int, int]]]:
        """Difference of gradients with and without checkpoints, and the memory of both."""
        gradients = []
        for checkpoint in (True, False):
            method = self._backpropagation(self.reward, Fixed(0), checkpoint=checkpoint)
            method.loss(self._draw(self.settings.batch_size)).backward()
            parts = [p.grad.flatten() for p in method.model.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts))
        few, many = self.settings.memory_steps
        memory = {keep: (self._peak(few, keep), self._peak(many, keep)) for keep in (True, False)}
        return float((gradients[0] - gradients[1]).abs().max()), memory

    def _peak(self, steps: int, checkpoint: bool) -> int:
        settings = self.settings
        shape = sizes[settings.memory_net].shape
        model = new_model(settings.memory_net, shape, seed=self.seed).to(self.device)
        method = AlignProp(model, Brightness(), steps=steps, solver="euler", truncation=Fixed(0),
            checkpoint=checkpoint, rank=settings.rank)  # fmt: skip

        def update() -> None:
            method.loss(self._draw(settings.memory_batch)).backward()
            method.model.zero_grad(set_to_none=True)

        return peak_bytes(update)

    def _draw(self, size: int) -> Draw:
        return Draw.of(size, seed=self.seed, generator=torch.Generator(self.device))

    def _backpropagation(self, reward: Any, rule: Any, *, checkpoint: bool = False) -> AlignProp:
        return AlignProp(
            self.flow,
            reward,
            steps=self.settings.chain,
            solver="euler",
            truncation=rule,
            rank=self.settings.rank,
            conditions=self.seen,
            checkpoint=checkpoint,
            seed=self.seed,
        )

    def _fit(
        self, method: RewardMethod, updates: int, rate: float
    ) -> tuple[FlowModel, str, list[float]]:
        """The aligned model, the solver to judge it by, and its curve."""
        training = TrainerSettings(
            steps=updates,
            batch_size=self.settings.batch_size,
            ema=0.0,
            seed=self.seed,
            optim=_optimizer(rate),
        )
        curve = RewardCurve(method, None)
        model = Trainer(method, training, title=method.name, callbacks=[curve]).fit()
        return model, "euler", [row["reward"] for row in curve.rows]

    def _arm(self, model: FlowModel, solver: str, curve: list[float]) -> Arm:
        def judged(images: Tensor, label: Tensor) -> Tensor:
            wanted = (label + 1) % int(self.flow.net.classes)
            return (self.judge.logits(images).argmax(1) == wanted).float()

        scores = {}
        for name, labels in ((REWARD, self.seen.values), (HELD_OUT, self._held)):
            label = labels[torch.arange(self.settings.samples) % len(labels)]
            rewards = {name: self.reward, JUDGE: judged}
            found = self._measure(model, rewards, solver, label)
            scores[name] = found[name]
            if name == REWARD:
                scores |= {JUDGE: found[JUDGE], DIVERSITY: found["diversity"]}
        shown = self.source[:16]
        label = self.seen.values[torch.arange(len(shown)) % len(self.seen)]
        images = sample(
            model,
            source=shown,
            steps=self.settings.chain,
            solver=solver,
            generator=torch.Generator(self.device).manual_seed(self.seed),
            label=label.to(self.device),
        )
        return Arm(scores, curve, images.cpu())

    def _measure(
        self, model: FlowModel, rewards: Mapping[str, Any], solver: str, label: Tensor
    ) -> dict[str, float]:
        return measure(
            model,
            rewards,
            self.source,
            steps=self.settings.chain,
            solver=solver,
            generator=torch.Generator(self.device).manual_seed(self.seed),
            label=label.to(self.device),
        )

    def _score(self, model: FlowModel, reward: Any) -> float:
        label = self.seen.values[torch.arange(self.settings.samples) % len(self.seen)]
        return self._measure(model, {REWARD: reward}, "euler", label)[REWARD]

    @property
    def _held(self) -> Tensor:
        return torch.tensor(self.settings.held_out)
