"""AlignProp: reward backpropagation against policy gradients, and how many steps should be kept.

Class-conditional digits stand in for Stable Diffusion and its prompts, the log-probability of the
*next* class under a linear classifier for a reward of meaning, and the mean pixel for one of
colour. A convolutional classifier that nothing was trained on judges beside them.

Source: arXiv 2310.03739, sections 4 and 5; the baseline: arXiv 2305.13301.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from rectiflow.files import cache_folder
from rectiflow.flows.couplings import Draw, Independent, TensorData
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.nets import sizes
from rectiflow.recipes.recipe import Check, Number, Result
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData, load
from rectiflow.training.evaluation import load_features
from rectiflow.training.figures import bands, compare_samples
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.report import cell
from rectiflow.training.runs import Run
from rectiflow.training.trainer import Trainer, TrainerSettings

CLAIM = (
    "Sending a reward's gradient back through the sampler reaches with a tenth of the images what "
    "a policy gradient does; checkpoints make its memory nearly independent of the number of "
    "steps; and keeping more than the last step helps rewards of meaning."
)
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


PRESETS = {
    "quick": Settings(
        net_options={"width": 32, "depth": 1},
        flow=stage(40, batch_size=64),
        chain=4,
        updates=3,
        batch_size=16,
        policy_rates=(1e-3,),
        policy_factor=2,
        samples=40,
        memory_net="mlp-digits",
        memory_steps=(2, 4),
        seeds=(0,),
    ),
    "default": Settings(),
    # Stable Diffusion with the aesthetic and preference rewards is `rectiflow align` on its folder;
    # here the same experiment on larger images and a U-Net.
    "paper": Settings(
        data="fashion-mnist",
        net="unet-s",
        net_options={},
        flow=TrainerSettings(steps=60_000, batch_size=128),
        chain=50,
        updates=400,
        batch_size=128,
        samples=5000,
        memory_batch=16,
    ),
}


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


def run(settings: Settings, run: Run) -> Result:
    """The experiments, their checks and pictures."""
    images, held = (load(settings.data, split=s) for s in ("train", "test"))
    features = load_features(images, held, kind="classifier", cache=cache_folder())
    found = []
    for seed in settings.seeds:
        lab = _Lab(settings, images, features.net, seed)
        difference, memory = lab.checkpoints()
        found.append(Found(lab.meaning(), lab.colour(), difference, memory))
    return Result(
        "alignprop",
        CLAIM,
        _numbers(found, settings),
        _checks(found),
        settings.seeds,
        _notes(settings),
        _draw(found, settings, run),
    )


class _Lab:
    """The experiments of one seed."""

    def __init__(self, settings: Settings, images: ImageData, judge: Any, seed: int) -> None:
        self.settings, self.seed = settings, seed
        classes = len(images.classes)
        start = new_model(
            settings.net, images.shape, seed=seed, classes=classes, **settings.net_options
        )
        flow = replace(settings.flow, seed=seed)
        self.flow = train(FlowMatching(start, Independent(images)), flow, title="flow")
        self.linear = fit_linear(images)
        self.judge = judge
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
            method.loss(Draw.of(self.settings.batch_size, seed=self.seed)).backward()
            parts = [p.grad.flatten() for p in method.model.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts))
        few, many = self.settings.memory_steps
        memory = {keep: (self._peak(few, keep), self._peak(many, keep)) for keep in (True, False)}
        return float((gradients[0] - gradients[1]).abs().max()), memory

    def _peak(self, steps: int, checkpoint: bool) -> int:
        settings = self.settings
        shape = sizes[settings.memory_net].shape
        model = new_model(settings.memory_net, shape, seed=self.seed)
        method = AlignProp(model, Brightness(), steps=steps, solver="euler", truncation=Fixed(0),
            checkpoint=checkpoint, rank=settings.rank)  # fmt: skip

        def update() -> None:
            method.loss(Draw.of(settings.memory_batch)).backward()
            method.model.zero_grad(set_to_none=True)

        return peak_bytes(update)

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
            generator=torch.Generator().manual_seed(self.seed),
            label=label,
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
            generator=torch.Generator().manual_seed(self.seed),
            label=label,
        )

    def _score(self, model: FlowModel, reward: Any) -> float:
        label = self.seen.values[torch.arange(self.settings.samples) % len(self.seen)]
        return self._measure(model, {REWARD: reward}, "euler", label)[REWARD]

    @property
    def _held(self) -> Tensor:
        return torch.tensor(self.settings.held_out)


def _scores(found: Sequence[Found], arm: str, name: str = REWARD) -> tuple[float, ...]:
    return tuple(one.meaning[arm].scores[name] for one in found)


def _less(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(above, below))


def _numbers(found: Sequence[Found], settings: Settings) -> list[Number]:
    few, many = settings.memory_steps
    shown = [
        Number(f"meaning: {name}", arm, _scores(found, arm, name))
        for name in (REWARD, HELD_OUT, JUDGE, DIVERSITY)
        for arm in found[0].meaning
    ]
    for arm in found[0].colour:
        shown.append(Number("colour: reward", arm, tuple(one.colour[arm] for one in found)))
    for keep, arm in ((True, "checkpoints"), (False, "no checkpoints")):
        values = tuple(one.memory[keep][1] / one.memory[keep][0] for one in found)
        shown.append(Number(f"peak memory, {many} steps / {few} steps", arm, values))
    return shown


def _checks(found: Sequence[Found]) -> list[Check]:
    """The specification's rules."""
    ours = _scores(found, NORMAL)
    more = tuple(map(min, ours, _scores(found, UNIFORM)))
    spread, gained = [], []
    for one in found:
        ends = [one.colour[arm] for arm in (LAST, NORMAL, UNIFORM)]
        spread.append(max(ends) - min(ends))
        gained.append(max(ends) - one.colour[BEFORE])
    return [
        Check(
            "backpropagation - REINFORCE on as many images, reward of meaning",
            _less(ours, _scores(found, POLICY)),
            at_least=0.0,
        ),
        Check(
            "backpropagation - REINFORCE on more images, reward of meaning",
            _less(ours, _scores(found, POLICY_MORE)),
            at_least=0.0,
        ),
        Check(
            "largest difference of gradients with and without checkpoints",
            tuple(one.difference for one in found),
            at_most=1e-6,
        ),
        Check(
            "peak memory with checkpoints, many steps / few",
            tuple(one.memory[True][1] / one.memory[True][0] for one in found),
            at_most=1.3,
        ),
        Check(
            "gain on classes that alignment never asked for",
            _less(_scores(found, NORMAL, HELD_OUT), _scores(found, BEFORE, HELD_OUT)),
            at_least=0.0,
        ),
        Check(
            "more steps in the graph (normal and uniform) - last step, reward of meaning",
            _less(more, _scores(found, LAST)),
            at_least=0.2,
            broken=0.0,
        ),
        Check(
            "reward of colour: spread of the rules / gain",
            tuple(s / g if g else float("nan") for s, g in zip(spread, gained)),
            at_most=0.05,
            broken=0.2,
        ),
    ]


def _notes(settings: Settings) -> list[str]:
    images = settings.updates * settings.batch_size
    rates = ", ".join(f"{rate:g}" for rate in settings.policy_rates)
    return [
        f"Backpropagation sees {images:,} images, the longer policy gradient "
        f"{settings.policy_factor} times as many; of its rates ({rates}) and of the two samplers "
        "it may be judged by, each seed counts the best.",
        "The policy gradient is the score-function form, one update a batch; reusing batches by "
        "clipped importance weights is not part of it.",
        f"Memory is that of {settings.memory_net} in batches of {settings.memory_batch}: each step "
        "adds one state, so a network whose activations are not much larger than its samples "
        "(an MLP on digits) would grow faster.",
        "The judge is a convolutional classifier that no reward was made of.",
    ]


def _draw(found: Sequence[Found], settings: Settings, run: Run) -> dict[Path, str]:
    """Rewards against images seen; samples of the arms from the same noises."""
    size = settings.batch_size
    lines = {}
    for arm, first in found[0].meaning.items():
        if first.curve and arm != POLICY:
            across = [size * (i + 1) for i in range(len(first.curve))]
            lines[arm] = (across, [one.meaning[arm].curve for one in found])
    curves = bands(
        lines,
        run.path("rewards.png"),
        across="images seen",
        up="reward of the training samples (nats)",
        logarithmic="",
    )
    arms = (BEFORE, LAST, NORMAL, FULL, POLICY, POLICY_MORE)
    sheet = compare_samples(
        {arm: found[0].meaning[arm].images for arm in arms}, run.path("samples.png")
    )
    means = {
        arm: cell(sum(_scores(found, arm)) / len(found))
        for arm in (BEFORE, LAST, NORMAL, UNIFORM, FULL, POLICY, POLICY_MORE)
    }
    told = ", ".join(f"{arm} {value}" for arm, value in means.items())
    return {
        curves: f"Log-probability of the next class during alignment. In the end: {told}. Band: "
        "range of the seeds.",
        sheet: "The same noises and labels: every digit should become the one after it. Seed "
        f"{settings.seeds[0]}.",
    }
