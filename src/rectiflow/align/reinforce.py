"""The policy gradient of a stochastic sampler: what reward backpropagation is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from rectiflow.align.method import Guide, RewardMethod
from rectiflow.errors import positive, unknown
from rectiflow.flows.couplings import Data, Draw
from rectiflow.flows.fields import FlowModel, velocity_of
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.integration import check_inputs, stage_times
from rectiflow.flows.stochastic import StochasticEuler

if TYPE_CHECKING:
    from jaxtyping import Float

ADVANTAGES = ("standardised", "centred", "raw")


class Reinforce(RewardMethod):
    """REINFORCE on the chain of a stochastic sampler, as DDPO does with its score-function form.

    Use it for rewards without a gradient, or as the baseline. Each step of the SDE with the field's
    marginals is a normal distribution, `x' ~ N(x + dt drift, dt g² I)`; the gradient of the mean
    reward is the mean of `A sum_i grad log p(x_{i+1} | x_i)` with the reward's advantage A. No
    gradient passes through the reward, the decoder or from step to step. Every batch is used once
    (on policy), so no importance weights are needed.

    Args:
        model: the model to align; it is not changed.
        reward: any function `reward(images, **condition) -> (b,)`.
        steps: number of steps or ascending grid of times; the model's own by default.
        noise: scale of the sampler's noise, > 0; 1 is the official eta.
        advantage: "standardised" (minus the batch's mean, over its deviation), "centred", or "raw",
            which alone is unbiased at any batch size. The batch is what goes through the network
            at once, a micro-batch where steps are split, and needs two samples but for "raw".
        checkpoint: compute steps again going backward.
        rank: rank of the adapters; 0 trains all weights.
        targets: layers that get adapters.
        conditions: data whose conditions samples are made for.
        guided: makes a guided field around the model.
        decode: from samples to images; no gradient is needed.
        seed: of the adapters' first weights.

    Raises:
        ValueError: an unknown advantage, noise that is not positive, a descending grid; when
            trained, one sample at a time with an advantage other than "raw".

    Source: arXiv 2305.13301, section 4 (DDPO, score function); the comparison: arXiv 2310.03739.
    """

    name = "reinforce"
    differentiable = False

    def __init__(
        self,
        model: FlowModel,
        reward: Any,
        *,
        steps: int | Sequence[float] | None = None,
        noise: float = 1.0,
        advantage: str = "standardised",
        checkpoint: bool = True,
        rank: int = 4,
        targets: Sequence[str] | None = None,
        conditions: Data | None = None,
        guided: Guide | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        positive("noise", noise)
        if advantage not in ADVANTAGES:
            raise unknown("advantage", advantage, ADVANTAGES)
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
        self.solver = StochasticEuler(noise)
        self.advantage, self.checkpoint = advantage, checkpoint
        self.solver.intervals(self.grid)

    def loss(self, draw: Draw) -> Tensor:
        """A number whose gradient is the policy gradient, with the opposite sign."""
        x, condition, own = self.start(draw)
        x, logs = self.chain(x, own, **condition)
        with torch.no_grad():
            images = self.decode(x) if self.decode is not None else x
            value = self.reward(images, **condition)
        self._note(value)
        return -(self._advantage(value) * logs.sum(1)).mean()

    def chain(
        self, x: Float[Tensor, "b *dims"], generator: torch.Generator, **condition: Any
    ) -> tuple[Float[Tensor, "b *dims"], Float[Tensor, "b steps"]]:
        """Sample chains and the log-probability of each of their steps, with gradient.

        Args:
            x: where they begin.
            generator: the source of their noise.
            **condition: the condition.

        Returns:
            the ends, without gradient, and the log-probabilities.
        """
        check_inputs(self.field, x, condition)
        refuse_memory(self.field, "steps are run again going backward")
        rule = self.solver.bind(self.field)
        velocity = velocity_of(self.field)
        lengths = rule.intervals(self.grid)
        stages = stage_times(x, self.grid, lengths, rule.nodes)
        logs = []
        for dt, (t,) in zip(lengths, stages):
            fresh = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

            def step(
                x: Tensor, t: Tensor = t, dt: float = dt, fresh: Tensor = fresh
            ) -> tuple[Tensor, Tensor]:
                mean, std = rule.moments(velocity(x, t, **condition), x, t, dt)
                after = (mean + std * fresh).detach()
                return after, log_normal(after, mean, std)

            x, log = recomputed(step, x, use_reentrant=False) if self.checkpoint else step(x)
            x = x.to(fresh.dtype)
            logs.append(log)
        return x, torch.stack(logs, 1)

    def _advantage(self, value: Tensor) -> Tensor:
        if self.advantage == "raw":
            return value
        if len(value) == 1:
            raise ValueError(
                f"advantage={self.advantage!r} compares the samples of a micro-batch and got one "
                "sample, which teaches nothing: take micro-batches of two or more, or "
                "advantage='raw'"
            )
        centred = value - value.mean()
        if self.advantage == "centred":
            return centred
        return centred / (centred.std() + 1e-8)


def log_normal(
    x: Float[Tensor, "b *dims"], mean: Float[Tensor, "b *dims"], std: Float[Tensor, "..."]
) -> Float[Tensor, " b"]:
    """The log-density of independent normal numbers, summed over each sample.

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> log_normal(zero, zero, torch.ones(1, 1))
        tensor([-1.8379])
    """
    each = -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).sum(1)
