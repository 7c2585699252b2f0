"""What keeps an aligned model near where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """What a regulariser sees of one micro-batch.

    Attributes:
        images: the images, with gradient.
        state: the state at a step drawn at random, without gradient.
        t: its time, `(b,)`.
        condition: the condition.
        field: the field that is trained.
        reference: the field it started from, not trained.
    """

    images: Tensor
    state: Tensor
    t: Tensor
    condition: dict[str, Any]
    field: Any
    reference: Any


class Regularizer(Protocol):
    """Adds to the loss."""

    weight: float

    def __call__(self, rollout: Rollout) -> Tensor:
        """The penalty, a number, before its weight."""


@dataclass(frozen=True)
class RangePenalty:
    """Mean squared distance of pixels to [-1, 1]: `mean(relu(|x| - 1)²)`.

    Rewards that clip their input are hacked at once without it: pixels run off to any value.

    Args:
        weight: its weight in the loss, >= 0.

    Example:
        >>> images = torch.tensor([[[[1.0, 3.0]]]])
        >>> RangePenalty()(Rollout(images, images, torch.zeros(1), {}, None, None))
        tensor(2.)
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("weight", self.weight, zero=True)

    def __call__(self, rollout: Rollout) -> Tensor:
        return F.relu(rollout.images.abs() - 1).square().mean()


@dataclass(frozen=True)
class FieldDrift:
    """Mean squared difference of velocities to the reference field, on the model's own states.

    Up to a weight in time it is the Kullback-Leibler divergence between the chains of the two
    fields when both are sampled with the same noise. It costs one evaluation of each field.

    Args:
        weight: its weight in the loss, >= 0; 0.01 to 0.1 as a rule.
    """

    weight: float = 0.05

    def __post_init__(self) -> None:
        positive("weight", self.weight, zero=True)

    def __call__(self, rollout: Rollout) -> Tensor:
        mine = rollout.field.velocity(rollout.state, rollout.t, **rollout.condition)
        with torch.no_grad():
            theirs = rollout.reference.velocity(rollout.state, rollout.t, **rollout.condition)
        return (mine - theirs).square().mean()
