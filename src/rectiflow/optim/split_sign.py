"""Steps that treat the largest coordinates of a gradient apart: signs there, momentum elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.optim.coordinate_clipping import top_threshold
from rectiflow.optim.parts import Direction, Stretch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SplitSign(Direction):
    """Dampened momentum m; where `|g|` is among the largest, the step is `ratio sign(m)`.

    A few coordinates with large, oscillating gradients are what makes plain descent unstable; here
    they move by a bounded amount, as Adam's do. The published rule could not be confirmed in its
    details: this is the one described in our documentation.

    Args:
        fraction: share of all weights that is treated apart, 0 (none: momentum) to 1 (all: signs).
        ratio: size of a sign step in units of the learning rate.
        momentum: weight of the memory.
        dampening: share of the gradient left out of it.

    Raises:
        ValueError: numbers out of range.

    Source: arXiv 2311.04163, section on optimizers.
    """

    fraction: float = 0.05
    ratio: float = 1e-2
    momentum: float = 0.9
    dampening: float = 0.9
    slots = ("momentum_buffer",)
    surveys = True

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {self.fraction}")

    @property
    def defaults(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "dampening": self.dampening, "sign_ratio": self.ratio}

    def check(self, group: Mapping[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if not 0 <= group["dampening"] <= 1:
            raise ValueError(f"dampening must be in [0, 1], got {group['dampening']}")
        positive("sign_ratio", group["sign_ratio"])

    def survey(
        self, groups: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
    ) -> Iterable[dict[str, Tensor]]:
        every = [grad for _, grads in groups for grad in grads]
        if not every or not 0 < self.fraction < 1:
            edge = torch.tensor(torch.inf if self.fraction == 0 else -1.0)
        else:
            device = every[0].device
            edge = top_threshold([grad.to(device) for grad in every], self.fraction)
        return [{"split_above": edge} for _ in groups]

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        return {
            "kept": float(group["momentum"]),
            "taken": 1.0 - group["dampening"],
            "sign_ratio": float(group["sign_ratio"]),
        }

    def apply(self, stretch: Stretch) -> None:
        number, memory = stretch.numbers, stretch.state["momentum_buffer"]
        memory.mul_(number["kept"]).add_(stretch.momentum_gradient * number["taken"])
        apart = stretch.gradient.abs() > number["split_above"].to(stretch.gradient)
        stretch.direction = torch.where(apart, memory.sign() * number["sign_ratio"], memory)
