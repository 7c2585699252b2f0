"""Train a condition rectifier on a handful of pictures of a relation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.distill.teachers import frozen
from rectiflow.errors import positive, unknown
from rectiflow.flows.couplings import Draw
from rectiflow.flows.fields import FlowModel, evaluating
from rectiflow.flows.times import TimeSampler
from rectiflow.flows.toward_noise import TowardNoise
from rectiflow.guidance.condition_rectifier import ConditionRectifier
from rectiflow.guidance.pair_contrast import PairContrastiveDenoising, PairLosses
from rectiflow.guidance.relation_prompts import PROMPTS, RelationPrompts, shift_ends
from rectiflow.training.method import Phase
from rectiflow.training.trainer import Trainer, TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PAIRINGS = (("ARB", "BRA"), ("ARB", "A"), ("ARB", "B"), ("BRA", "B"), ("BRA", "A"))
"""Which two prompts a step contrasts, five steps an iteration.

The first pairing teaches the order; the others hold the relation apart from its objects.
"""
ALONE = ("A", "B")


@dataclass(frozen=True, eq=False)
class RelationExamples:
    """Pictures of one relation with the prompts they belong to.

    Attributes:
        prompts: the four prompts.
        pictures: pictures of each of `PROMPTS`, in the model's own space, `(n, ...)` each.

    Raises:
        ValueError: pictures of a prompt that are missing, or of another shape than the others.
    """

    prompts: RelationPrompts
    pictures: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name in PROMPTS:
            if name not in self.pictures or not len(self.pictures[name]):
                raise ValueError(f"there are no pictures of {name}: {', '.join(PROMPTS)} need some")
        shapes = {name: tuple(self.pictures[name].shape[1:]) for name in PROMPTS}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"pictures must have one shape, got {shapes}")


class RelationFitting:
    """The method that trains a `ConditionRectifier` on one or more examples of a relation.

    Each training step contrasts two prompts, in the order of `pairings`; pictures are drawn once
    for all pairings and then anew. A step's samples are pairs of pictures with two noises and one
    time. The shift of a prompt comes from the graph that has its first object for the first: the
    sentence about B alone takes it from the graph of B R A.

    The model is frozen: only the rectifier gets gradients. `fit_relation` runs a trainer and
    returns the rectifier.

    Args:
        model: a conditional model that is moved to the device of training, but not changed.
        rectifier: what is trained.
        examples: prompts and pictures; several relations of equal shapes are drawn in turn.
        loss: what is minimised.
        times: which times are looked at; `TowardNoise()` by default.
        pairings: which prompts a step contrasts.
        jitter: noise added to shifts of objects alone, so that they say no more than they must.

    Raises:
        ValueError: no examples or pairings, an unknown prompt, or pictures or words of sizes that
            model or rectifier do not take.

    Source: arXiv 2403.20249, section 4.3, and its released code: five pairings an iteration, one
        time for both halves of a pair, jitter 0.05. Its time is drawn once for the whole batch,
        which was one pair; here each pair has its own.
    """

    name = "relation"

    def __init__(
        self,
        model: FlowModel,
        rectifier: ConditionRectifier,
        examples: RelationExamples | Sequence[RelationExamples],
        loss: PairContrastiveDenoising | None = None,
        *,
        times: TimeSampler | None = None,
        pairings: Sequence[tuple[str, str]] = PAIRINGS,
        jitter: float = 0.05,
    ) -> None:
        self.examples: tuple[RelationExamples, ...]
        self.examples = (examples,) if isinstance(examples, RelationExamples) else tuple(examples)
        self.loss_of = loss if loss is not None else PairContrastiveDenoising()
        self.times = times if times is not None else TowardNoise()
        self.pairings, self.jitter = tuple(pairings), jitter
        positive("jitter", jitter, zero=True)
        if not self.examples or not self.pairings:
            raise ValueError("fitting a relation needs one or more examples and pairings")
        for name in (name for pair in self.pairings for name in pair):
            if name not in PROMPTS:
                raise unknown("prompt of a relation", name, PROMPTS)
        shape = tuple(self.examples[0].pictures[PROMPTS[0]].shape[1:])
        if model.shape is not None and model.shape != shape:
            raise ValueError(
                f"the model makes samples of shape {model.shape}, pictures have {shape}"
            )
        if self.loss_of.cap is not None:
            rectifier.cap = self.loss_of.cap
        self.frozen, self.rectifier = model, rectifier
        # What the trainer moves, averages and returns; the frozen model is none of it.
        self.model = FlowModel(rectifier)
        self.deltas()

    def phases(self) -> list[Phase]:
        """The one phase."""
        return [Phase(self.name, self.rectifier, self.loss)]

    def loss(self, draw: Draw) -> Tensor:
        """The mean loss of the draw's pairs under the pairing of its step."""
        return self.losses(draw).total.mean()

    def losses(self, draw: Draw, loss: PairContrastiveDenoising | None = None) -> PairLosses:
        """The losses of the draw's pairs, by another loss than the method's where one is given."""
        iteration, place = divmod(draw.step, len(self.pairings))
        pair = self.pairings[place]
        # Pictures depend on the iteration, noises and times on the step.
        once = replace(draw, step=iteration, before=None)
        which = once.indices(len(self.examples), stream=len(PROMPTS))
        pictures = torch.stack([self._pictures(name, which, once) for name in pair], 1)
        pictures = pictures.to(draw.device, non_blocking=True)
        noise = draw.normal(pictures.shape[1:]).to(pictures.dtype)
        t = self.times.sample(draw.size, generator=draw.generator)[draw.part].to(pictures.dtype)
        condition = self._condition(pair, which, draw)
        self.frozen.to(draw.device)
        with frozen(self.frozen), evaluating(self.frozen):
            return (loss or self.loss_of)(self.frozen, pictures, noise, t, condition)

    def deltas(self) -> Float[Tensor, "examples 4 width"]:
        """The shift of every prompt of every example."""
        weight = next(self.rectifier.parameters())
        return self.rectifier.deltas(self._nodes.to(weight))

    @torch.no_grad()
    def contrast(self, size: int = 64, *, seed: int = 0) -> float:
        """How much better the first pairing's prompts explain their own pictures than each other's.

        `(L- - L+) / (L- + L+)` on fixed noises: near 0 before training. It falls again when shifts
        leave what the model knows and both errors grow, so it says when to stop.

        Args:
            size: pairs.
            seed: of the noises; give one that training does not use.
        """
        weight = next(self.rectifier.parameters())
        draw = Draw.of(size, seed=seed, generator=torch.Generator(weight.device))
        found = self.losses(draw, replace(self.loss_of, lambda_neg=1.0))
        assert found.negative is not None
        own, other = found.positive.mean(), found.negative.mean()
        return float((other - own) / (other + own))

    def _pictures(self, name: str, which: Int[Tensor, " b"], once: Draw) -> Tensor:
        """A picture of a prompt for each row, of the example that the row belongs to."""
        stream = PROMPTS.index(name)
        found = []
        for example in self.examples:
            pictures = example.pictures[name]
            rows = once.indices(len(pictures), stream=stream)
            found.append(pictures[rows.to(pictures.device)])
        return torch.stack(found)[which, torch.arange(len(which))]

    def _condition(
        self, pair: tuple[str, str], which: Int[Tensor, " b"], draw: Draw
    ) -> dict[str, Any]:
        """The shifted condition of both prompts of every row."""
        prompt = torch.tensor([PROMPTS.index(name) for name in pair])
        delta = self.deltas()[which[:, None], prompt]
        if self.jitter:
            alone = torch.tensor([name in ALONE for name in pair], device=draw.device)
            noise = draw.normal(delta.shape[1:]).to(delta.dtype)
            delta = delta + self.jitter * alone[:, None] * noise
        rows = {name: v[which[:, None], prompt].flatten(0, 1) for name, v in self._table.items()}
        condition = {name: value.to(draw.device) for name, value in rows.items()}
        key, ends = self.examples[0].prompts.key, self._ends
        if ends is not None:
            ends = ends[which[:, None], prompt].flatten().to(draw.device)
        condition[key] = shift_ends(condition[key], ends, delta.flatten(0, 1))
        return condition

    @functools.cached_property
    def _nodes(self) -> Tensor:
        return torch.stack([one.prompts.nodes() for one in self.examples])

    @functools.cached_property
    def _table(self) -> dict[str, Tensor]:
        conditions = [one.prompts.condition for one in self.examples]
        return {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}

    @functools.cached_property
    def _ends(self) -> Tensor | None:
        ends = [one.prompts.ends for one in self.examples]
        return None if ends[0] is None else torch.stack([e for e in ends if e is not None])


def fit_relation(
    method: RelationFitting,
    settings: TrainerSettings,
    *,
    folder: Path | str | None = None,
    title: str = "relation",
    resume: bool = False,
    callbacks: Sequence[Callable[[Trainer, int], None]] = (),
) -> ConditionRectifier:
    """Run a trainer on a relation and return the rectifier.

    Args:
        method: what is trained.
        settings: how; an iteration is as many steps as the method has pairings.
        folder: where checkpoints and the loss log go; see `Trainer`.
        title: shown beside the progress bar.
        resume: go on from the newest checkpoint in the folder.
        callbacks: see `Trainer`.
    """
    trainer = Trainer(method, settings, folder=folder, title=title, callbacks=callbacks)
    found = trainer.fit(resume=resume).net
    assert isinstance(found, ConditionRectifier)
    return found
