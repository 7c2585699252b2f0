"""Fine-tune a sampler by sending a reward's gradient back through its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from rectiflow.align.chain import sample_with_gradient
from rectiflow.align.method import Guide, RewardMethod, follow
from rectiflow.align.regularizers import Regularizer, Rollout
from rectiflow.align.truncation import Normal, Truncation
from rectiflow.errors import unknown
from rectiflow.flows.couplings import Data, Draw
from rectiflow.flows.fields import FlowModel

LOSSES = ("neg", "l1-target")


class AlignProp(RewardMethod):
    """Reward backpropagation: the gradient of a reward through the chain that made the image.

    Use it when the reward is differentiable: it needs far fewer images than a policy gradient. The
    loss is `coefficient mean(-R)`, or `coefficient mean(|R - target|)`, of images sampled anew in
    every step; low-rank adapters are trained, the base stays. A reward that is pushed on for long
    is deceived: watch a second one (`EarlyStop`), add `RangePenalty` and `FieldDrift`, or scale
    the adapters down afterwards (`scale_adapter`).

    Args:
        model: the model to align; it is not changed and serves as the reference. A model with
            adapters goes on training these.
        reward: `reward(images, **condition) -> (b,)`; `RewardMix` joins several.
        steps: number of steps or grid of times; the model's own by default. Straight flows do with
            4 to 10.
        solver: any solver; the model's own by default.
        truncation: which last steps carry gradient, drawn once a micro-batch; `Normal()` as the
            official scripts. More steps help rewards of meaning, few do for colour.
        checkpoint: compute steps (and `decode`) again going backward instead of keeping their
            activations.
        rank: rank of the adapters; 0 trains all weights.
        targets: layers that get adapters; see `gaussian_lora`.
        conditions: data whose conditions samples are made for; none for unconditional models.
        guided: makes a guided field around the model, such as
            `lambda m: ClassifierFreeGuidance(m, 5.0)`; both branches carry gradient.
        decode: from samples to images with gradient, such as `partial(decode_latents, pipe)`.
        loss: "neg" or "l1-target".
        target: the wanted reward for "l1-target".
        coefficient: scale of the reward's loss, which sets it against the regularisers.
        regularizers: added to the loss with their weights.
        seed: of the adapters' first weights.

    Raises:
        ValueError: an unknown loss, a target without use, a rule that asks for more steps than
            there are, a model that does not know its shape, and what `Checked` refuses.

    Example:
        >>> from rectiflow.align.rewards import Brightness
        >>> from rectiflow.nets import MLP
        >>> model = FlowModel(MLP(shape=(2,), width=8, depth=1, zero=False), shape=(2,))
        >>> method = AlignProp(model, Brightness(), steps=4, truncation=Normal())
        >>> method.loss(Draw.of(3)).requires_grad
        True

    Source: arXiv 2310.03739, section 4; `LastK` is arXiv 2309.17400. A copy of the method once in
        another library draws the cut anew for every step; here it is drawn once.
    """

    name = "alignprop"
    differentiable = True

    def __init__(
        self,
        model: FlowModel,
        reward: Any,
        *,
        steps: int | Sequence[float] | None = None,
        solver: Any = None,
        truncation: Truncation | None = None,
        checkpoint: bool = True,
        rank: int = 4,
        targets: Sequence[str] | None = None,
        conditions: Data | None = None,
        guided: Guide | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        loss: str = "neg",
        target: float | None = None,
        coefficient: float = 1.0,
        regularizers: Sequence[Regularizer] = (),
        seed: int = 0,
    ) -> None:
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        if (target is None) == (loss == "l1-target"):
            raise ValueError("target is the wanted reward of loss 'l1-target': give both or none")
        if not (math.isfinite(coefficient) and coefficient > 0):
            raise ValueError(f"coefficient must be finite and > 0, got {coefficient}")
        super().__init__(
            model,
            reward,
            steps=steps,
            rank=rank,
            targets=targets,
            conditions=conditions,
            guided=guided,
            decode=decode,
            seed=seed,
        )
        self.solver = solver if solver is not None else model.sampling["solver"]
        self.truncation = truncation if truncation is not None else Normal()
        self.truncation.first(self.steps, 0.0)
        self.checkpoint = checkpoint
        self.target, self.coefficient = target, coefficient
        self.regularizers = tuple(regularizers)

    def loss(self, draw: Draw) -> Tensor:
        """The loss of fresh samples, with the gradient of the last steps."""
        x, condition, own = self.start(draw)
        first, watched = self._drawn(own)
        seen: list[tuple[Tensor, float]] = []

        def visit(index: int, time: float, state: Tensor) -> None:
            if index == watched and self.regularizers:
                seen.append((state, time))

        x = sample_with_gradient(
            self.field,
            x,
            self.grid,
            self.solver,
            first=first,
            checkpoint=self.checkpoint,
            generator=own,
            visit=visit,
            **condition,
        )
        images = self._images(x)
        value = self.reward(images, **condition)
        self._note(value, gradient_steps=float(self.steps - first))
        wrong = -value if self.target is None else (value - self.target).abs()
        loss = self.coefficient * wrong.mean()
        for state, time in seen:
            t = state.new_full((state.shape[0],), time)
            reference = follow(self.reference, state.device)
            rollout = Rollout(images, state, t, condition, self.model, reference)
            for regularizer in self.regularizers:
                if regularizer.weight:
                    loss = loss + regularizer.weight * regularizer(rollout)
        return loss

    def _drawn(self, generator: torch.Generator) -> tuple[int, int]:
        """The first step with gradient, and the step that regularisers look at."""
        cut, look = torch.rand(
            2, generator=generator, device=generator.device, dtype=torch.float64
        ).tolist()
        return self.truncation.first(self.steps, cut), int(look * self.steps)

    def _images(self, x: Tensor) -> Tensor:
        if self.decode is None:
            return x
        if self.checkpoint:
            return recomputed(self.decode, x, use_reentrant=False)
        return self.decode(x)
