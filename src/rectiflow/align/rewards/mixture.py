"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.align.rewards.checked import Checked

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class RewardMix:
    """A weighted sum of rewards, each checked by itself.

    Rewards live on different scales (a log-probability against a mean pixel): choose weights so
    that the terms of the untrained model have about the same spread.

    Args:
        rewards: name to reward.
        weights: name to weight, which may be negative; 1 by default.

    Raises:
        ValueError: no reward, or weights that are not finite, all zero or of unknown names; when
            called with images that want a gradient, a reward that has none and counts.

    Example:
        >>> mix = RewardMix({"mean": lambda x: x.mean(1), "top": lambda x: x.amax(1)}, {"top": 0.5})
        >>> mix(torch.tensor([[0.0, 2.0]]))
        tensor([2.])
    """

    def __init__(
        self, rewards: Mapping[str, Any], weights: Mapping[str, float] | None = None
    ) -> None:
        if not rewards:
            raise ValueError("a mixture needs at least one reward")
        given = dict(weights or {})
        extra = sorted(given.keys() - rewards.keys())
        if extra:
            raise ValueError(f"there is a weight for {extra[0]!r} but no reward of this name")
        self.weights = {name: float(given.get(name, 1.0)) for name in rewards}
        if not all(map(math.isfinite, self.weights.values())) or not any(self.weights.values()):
            raise ValueError(f"weights must be finite and not all 0, got {self.weights}")
        self.rewards = {
            # A reward that only shows its value may do without a gradient.
            name: Checked(reward, differentiable=self.weights[name] != 0)
            for name, reward in rewards.items()
        }

    def __call__(self, images: Float[Tensor, "b *dims"], **condition: Any) -> Float[Tensor, " b"]:
        parts = self.parts(images, **condition)
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(0)

    def parts(self, images: Float[Tensor, "b *dims"], **condition: Any) -> dict[str, Tensor]:
        """Every reward by itself, before its weight."""
        return {name: reward(images, **condition) for name, reward in self.rewards.items()}
