"""What an optimizer is chained of: parts that turn a gradient into a direction of travel.

A part is written once, for a stretch of a flat buffer. The chain decides whether that stretch is a
block that fits the cache, or the whole buffer inside one compiled kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.optim.buckets import Bucket


@dataclass(slots=True)
class Stretch:
    """A stretch of weights with all that belongs to them; 1-D tensors of one length.

    Attributes:
        param: the weights before the step, in float32 at least.
        raw: the gradient as autograd left it.
        gradient: the gradient for the direction rule; rectifiers of gradients change it.
        momentum_gradient: what enters first moments; the gradient unless a rectifier says else.
        direction: the direction of travel: the step is `-lr` times it. The gradient, before the
            direction rule has spoken.
        state: buffers of the parts by name, changed in place.
        numbers: the group's settings and what depends on the step, by name.
    """

    param: Tensor
    raw: Tensor
    gradient: Tensor
    momentum_gradient: Tensor
    direction: Tensor
    state: dict[str, Tensor]
    numbers: dict[str, Any]

    @classmethod
    def of(
        cls, param: Tensor, raw: Tensor, state: dict[str, Tensor], numbers: dict[str, Any]
    ) -> Stretch:
        """A stretch as a step begins."""
        gradient = -raw if numbers.get("up") else raw
        return cls(param, raw, gradient, gradient, gradient, state, numbers)


@dataclass(slots=True)
class Whole(Stretch):
    """Whole tensors, neighbours in a buffer: what parts see that need them.

    Attributes:
        bucket: where each weight lies; `bucket.views` has their shapes.
        indices: numbers of the weights that take part; what lies at others is not used.
        begin: where in the buffer the stretch begins.
    """

    bucket: Bucket
    indices: Sequence[int]
    begin: int

    def span(self, index: int) -> tuple[int, int]:
        """Where a weight begins and ends in the stretch."""
        start, stop = self.bucket.spans[index]
        return start - self.begin, stop - self.begin

    def cut(self, place: slice) -> Stretch:
        """A stretch of it, without copies."""
        gradient = self.gradient[place]
        same = self.momentum_gradient is self.gradient
        return Stretch(
            self.param[place],
            self.raw[place],
            gradient,
            gradient if same else self.momentum_gradient[place],
            self.direction[place],
            {name: buffer[place] for name, buffer in self.state.items()},
            self.numbers,
        )


class Part(ABC):
    """One link of a chain.

    Attributes:
        slots: names of its buffers, one number a weight, zero at first.
        on: "gradient" for rectifiers in front of the direction rule, "direction" for those behind
            it and for the rule itself.
        whole: whether it needs whole tensors, and so `apply` gets a `Whole`.
        joint: whether that has to hold all weights of one kind in a group at once.
        surveys: whether it looks at all gradients, as the rectifiers before it leave them, before
            any weight moves.
    """

    slots: tuple[str, ...] = ()
    on: ClassVar[str] = "direction"
    whole: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    surveys: ClassVar[bool] = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that parameter groups may change."""
        return {}

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for settings that cannot be."""
        return

    def check_chain(self, parts: Sequence[Part]) -> None:
        """Raise ValueError for a chain that lacks what the part needs."""
        return

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """What the part needs to know of the group at a step, counted from 1."""
        return {}

    def survey(
        self, groups: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
    ) -> Iterable[dict[str, Tensor]]:
        """Numbers that depend on all gradients: one dictionary a group, of 0-dim tensors.

        Args:
            groups: each group with its gradients, as they reach the part.
        """
        return [{} for _ in groups]

    @abstractmethod
    def apply(self, stretch: Any) -> None:
        """Change the gradient or the direction of a stretch, and the part's own state."""


class Direction(Part):
    """A rule that makes a direction of a gradient."""


def approach(buffer: Tensor, goal: Tensor, share: Any) -> None:
    """Move a buffer in place toward a goal: `buffer + share (goal - buffer)`.

    Args:
        buffer: what moves.
        goal: where to.
        share: a number, or inside a kernel a tensor of one element, for which `lerp_` would not
            be traced.
    """
    if isinstance(share, float):
        buffer.lerp_(goal, share)
    else:
        buffer.add_((goal - buffer) * share)


def approach_square(buffer: Tensor, goal: Tensor, share: Any) -> None:
    """Move a buffer in place toward the squares of a goal, as `approach` does."""
    if isinstance(share, float):
        buffer.mul_(1 - share).addcmul_(goal, goal, value=share)
    else:
        approach(buffer, goal.square(), share)


def add_scaled(buffer: Tensor, added: Tensor, factor: Any) -> None:
    """`buffer + factor added` in place, for a number or a tensor of one element."""
    if isinstance(factor, float):
        buffer.add_(added, alpha=factor)
    else:
        buffer.add_(added * factor)


def scale_and_shift(values: Tensor, factor: Any, offset: Any) -> Tensor:
    """`factor values + offset` in place, for numbers or tensors of one element."""
    if isinstance(factor, float):
        start = torch.tensor(offset, dtype=values.dtype)
        return torch.add(start, values, alpha=factor, out=values)
    return values.mul_(factor).add_(offset)


def square_root(values: Tensor) -> Tensor:
    """Square roots, in new memory.

    On a CPU by way of the reciprocal's: torch's own goes through a library that is several times
    slower on some processors.
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return values.rsqrt().reciprocal_()
    return values.sqrt()


def change_gradient(stretch: Stretch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the gradient of a stretch, and what enters first moments in the same way."""
    gradient, average = stretch.gradient, stretch.momentum_gradient
    stretch.gradient = stretch.direction = change(gradient)
    stretch.momentum_gradient = stretch.gradient if average is gradient else change(average)


def move(stretch: Stretch, target: Tensor) -> None:
    """Weight decay and the step, into the weights."""
    param, numbers = stretch.param, stretch.numbers
    if numbers["decay"]:
        param.mul_(1 - numbers["decay"])
    param.sub_(stretch.direction, alpha=numbers["lr"])
    if param.dtype != target.dtype:
        target.copy_(param)
