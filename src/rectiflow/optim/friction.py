"""Friction: a direction weighted by how much its gradient has just changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import unknown
from rectiflow.optim.parts import Part, Stretch, square_root

if TYPE_CHECKING:
    from torch import Tensor

# What they are given is changed in place.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs_,
    "identity": torch.positive,
    "negate": torch.neg_,
}


@dataclass(frozen=True)
class Friction(Part):
    """`scale sigmoid(slope s(g_before - g)) + offset` times the direction, weight by weight.

    With the defaults it is 1/2 where the gradient stays as it is and nears 1 where it changes by
    more than a few units. It depends on the absolute size of gradients, unlike Adam: a loss that
    is summed rather than averaged, or gradients still multiplied by a `GradScaler`, change it. For
    the gradients of usual networks it is 1/2 to three digits, and Adam at half the rate is the
    control to compare with. `Friction.preset` has the forms of the paper.

    Args:
        scale: height of the sigmoid.
        slope: its slope.
        offset: added to it.
        shape: what the sigmoid sees of the change: "abs", "identity" (`g_before - g`) or "negate".
        relative: divide the change by the root of Adam's mean of squares, so that the loss may be
            scaled at will; an extension of ours.

    Raises:
        ValueError: an unknown shape, or `relative` with another rule than Adam.

    Source: arXiv 1909.11015, equation 5 (`xi`); the gradient before the first is 0.
    """

    scale: float = 1.0
    slope: float = 1.0
    offset: float = 0.0
    shape: str = "abs"
    relative: bool = False
    slots = ("previous_grad",)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise unknown("shape of friction", self.shape, SHAPES)
        # Of a change without sign the sigmoid is one half at least.
        least = 0.5 if self.shape == "abs" and self.slope >= 0 else 0.0
        if self.offset + min(least * self.scale, self.scale) < 0:
            warnings.warn(
                "this friction can be negative and then reverses a step: training may diverge",
                stacklevel=3,
            )

    @classmethod
    def preset(cls, name: str, *, relative: bool = False) -> Friction:
        """A form of the paper: v0 is the method, the others are its ablation.

        The constants of v3, v4 and v5 could not be confirmed.

        Raises:
            ValueError: an unknown name.

        Example:
            >>> Friction.preset("v2").slope
            0.5
        """
        if name not in PRESETS:
            raise unknown("friction", name, PRESETS)
        shape, scale, slope, offset = PRESETS[name]
        return cls(scale, slope, offset, shape, relative)

    def check_chain(self, parts: Sequence[Part]) -> None:
        if self.relative and not any("exp_avg_sq" in part.slots for part in parts):
            raise ValueError(
                "relative friction divides by Adam's mean of squares: put it behind Adam, or take "
                "relative=False"
            )

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        if not self.relative:
            return {}
        decay = float(group["betas"][1])
        return {"change_root": (1 - decay**step) ** 0.5}

    def apply(self, stretch: Stretch) -> None:
        before, now = stretch.state["previous_grad"], stretch.gradient
        change = before.sub_(now)
        if self.relative:
            spread = square_root(stretch.state["exp_avg_sq"]).div_(stretch.numbers["change_root"])
            change.div_(spread.add_(stretch.numbers["eps"]))
        weight = self.weigh(change)
        before.copy_(now)
        stretch.direction = weight.mul_(stretch.direction)

    def weigh(self, change: Tensor) -> Tensor:
        """Weights of directions by changes of gradients, `g_before - g`, whose memory it uses."""
        # In place: a new block of memory costs as much as the arithmetic.
        change = SHAPES[self.shape](change)
        if self.slope != 1:
            change.mul_(self.slope)
        weight = change.sigmoid()
        if self.scale != 1 or self.offset:
            weight.mul_(self.scale).add_(self.offset)
        return weight


PRESETS: dict[str, tuple[str, float, float, float]] = {
    "v0": ("abs", 1.0, 1.0, 0.0),
    "v1": ("identity", 1.0, 1.0, 0.0),
    "v2": ("abs", 9.0, 0.5, -4.0),
    "v3": ("identity", 9.0, 0.5, -4.0),
    "v4": ("abs", 10.0, 0.5, -5.0),
    "v5": ("identity", 10.0, 0.5, -5.0),
}
