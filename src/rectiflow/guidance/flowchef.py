"""FlowChef: steer a flow toward a small cost while it is sampled, without inversion or training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rectiflow.errors import SteeringDivergedError, positive, unknown
from rectiflow.flows.fields import velocity_of
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.paths import Path, expand
from rectiflow.guidance.costs import Cost, StateCost, as_cost
from rectiflow.vectors import clip_norm

if TYPE_CHECKING:
    from rectiflow.flows.integration import Step

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "linear", "noise")


@dataclass(eq=False)
class FlowChef:
    """A corrector that moves each state so that its estimate of the data costs less.

    Pass it to `integrate` or `sample` as one of `correctors`. After a step from x at time t with
    velocity v, the data estimate D of (x, v) is made by the path's exact conversion and x moves by
    `-s dL(D)/dx` with v held fixed: the derivative of the network is skipped, so nothing runs
    backward through it and the network is called no more often than without steering. On the
    rectified path `D = x + (1 - t) v` and the gradient is that of the cost at D. Steps of higher
    order are corrected once, from their first velocity. The last step is left alone. A `StateCost`
    is asked about the state after the step instead, which moves down the gradient of that.

    Skipping is exact where the velocity does not depend on x, good where it changes slowly, and
    wrong where it bends; `skip=False` runs the network once more, with its derivative, to compare.

    A sample whose cost rose three times in a row, to above twice the first one, warns once a
    trajectory that the step size may be too large; well-behaved costs rise by less at the start.

    Args:
        cost: a `Cost`, any function of the data with one number a sample, or a `StateCost`.
        step_size: s, for costs summed over a sample. Divided by the curvature of the cost where
            that is known (`scaled`): 0.05 to 0.2 suits every linear measurement. With adam, in
            units of the data.
        inner: moves in each step, all with the same velocity.
        optimizer: `sgd`, or `adam` with a new state in every step (moves of `step_size` a number).
        skip: skip the derivative of the network; False computes it.
        first_step: number of the first step that is corrected.
        max_steps: number of the first step that no longer is; None for no end.
        until: steps that begin at this time or later are not corrected.
        last: correct the step that ends at time 1 too.
        schedule: factor of the step size: `constant`, `linear` (from 1 at time 0 to 0 at `until`),
            `noise` (in proportion to sigma(t)), or a function of the time.
        scaled: divide the step size by the curvature of the cost.
        clip: longest move, as a part of `sqrt(D) sigma(t)` with D numbers a sample; None for none.
        growth: a sample whose cost rose three times in a row, to above this many times the first
            one (or 1, if that is more), has diverged.
        path: the path, for fields that are plain functions.
        velocity: from which velocity the data are estimated; that of the step by default.

    Attributes:
        costs: the cost of each sample before each correction, of the latest trajectory.

    Raises:
        ValueError: settings out of range; a field without a path; falling times; a scaled step of
            1 or more; `skip=False` on a field with momentum.
        SteeringDivergedError: a cost that is not finite, or that grows as said at `growth`.

    Example:
        >>> from rectiflow.flows import FlowModel, integrate
        >>> from rectiflow.guidance import Masked
        >>> chef = FlowChef(Masked(torch.ones(1, 2), torch.ones(2)), step_size=0.5)
        >>> model = FlowModel(lambda x, t: torch.zeros_like(x))
        >>> integrate(model, torch.full((1, 2), 0.5), 2, correctors=(chef,))
        tensor([[1., 1.]])

    Source: arXiv 2412.00100, algorithm 1. The scaling, the clip, the warning and the stop
        are ours.
    """

    cost: Cost | StateCost | Callable[[Tensor], Tensor]
    step_size: float = 0.1
    inner: int = 1
    optimizer: str = "sgd"
    skip: bool = True
    first_step: int = 0
    max_steps: int | None = None
    until: float = 1.0
    last: bool = False
    schedule: str | Callable[[float], float] = "constant"
    scaled: bool = True
    clip: float | None = 1.0
    growth: float = 10.0
    path: Path | None = None
    velocity: Callable[[Step], Tensor] | None = None
    costs: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _rises: Tensor | None = field(default=None, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)
    _curvatures: dict[tuple[int, ...], float | None] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.cost = as_cost(self.cost)
        if not 0 <= self.step_size < math.inf:
            raise ValueError(f"step_size must be finite and >= 0, got {self.step_size}")
        positive("inner", self.inner)
        positive("first_step", self.first_step, zero=True)
        if self.max_steps is not None:
            positive("max_steps", self.max_steps, zero=True)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer of steering", self.optimizer, OPTIMIZERS)
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise unknown("schedule of steering", self.schedule, SCHEDULES)
        if not 0 <= self.until <= 1:
            raise ValueError(f"until must be in [0, 1], got {self.until}")
        if self.clip is not None:
            positive("clip", self.clip)
        positive("growth", self.growth)
        if not self.skip and self.velocity is not None:
            raise ValueError("velocity has no effect with skip=False: leave one of them out")
        if isinstance(self.cost, StateCost) and (self.velocity is not None or not self.skip):
            raise ValueError("a cost of states takes neither velocity nor skip: leave them out")

    def __call__(self, step: Step) -> Tensor:
        """The state after the step, corrected."""
        if step.next_time < step.time:
            raise ValueError(
                f"FlowChef steers toward the data, but the times fall from {step.time:g} to "
                f"{step.next_time:g}: give rising times"
            )
        if step.index <= self.first_step:
            self.costs, self._rises, self._warned, self._curvatures = [], None, False, {}
        if not self._applies(step):
            return step.after
        return step.after + self._move(step).to(step.after.dtype)

    def _applies(self, step: Step) -> bool:
        """Whether the step is one of those to correct."""
        inside = step.index >= self.first_step and step.time < self.until
        if self.max_steps is not None:
            inside = inside and step.index < self.max_steps
        return inside and self.step_size > 0 and (self.last or step.next_time < 1)

    def _move(self, step: Step) -> Tensor:
        """By how much the state moves, that before the step or, for a cost of states, after it."""
        path = self.path if self.path is not None else getattr(step.field, "path", None)
        if path is None:
            raise ValueError("steering needs the path of the field: give FlowChef(path=...)")
        of_state = isinstance(self.cost, StateCost)
        x = (step.after if of_state else step.before).detach()
        time = step.next_time if of_state else step.time
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((x.shape[0],), time, dtype=dtype, device=x.device)
        slope = self._slope_of(step, path, t)
        size = self._size(step.time, path, t, tuple(x.shape[1:]))
        bound = None
        if self.clip is not None:
            bound = self.clip * math.sqrt(x[0].numel()) * path.sigma(t)
        moments: tuple[Tensor, Tensor] | None = None
        start = x
        for index in range(self.inner):
            value, gradient = slope(x)
            if index == 0:
                self._watch(step, value)
            if self.optimizer == "adam":
                gradient, moments = _adam(gradient, moments, index + 1)
            move = -size * gradient
            x = x + (move if bound is None else clip_norm(move, bound))
        return x - start

    def _size(self, time: float, path: Path, t: Tensor, shape: tuple[int, ...]) -> float:
        """The step size at a time, with the schedule and the curvature of the cost."""
        size = self.step_size
        if callable(self.schedule):
            size *= self.schedule(time)
        elif self.schedule == "linear":
            size *= 1 - time / self.until
        elif self.schedule == "noise":
            size *= float(path.sigma(t[0]) / path.sigma(torch.zeros_like(t[0])))
        known = None
        if isinstance(self.cost, Cost) and self.scaled and self.optimizer == "sgd":
            # It may take an operation on the device to find, and is the same in every step.
            if shape not in self._curvatures:
                self._curvatures[shape] = self.cost.curvature(shape)
            known = self._curvatures[shape]
        if not known:
            return size
        if size >= 1:
            raise ValueError(
                f"step_size must be below 1 where the curvature of the cost is known, got "
                f"{size:g}: a larger one makes the residual grow; 0.05 to 0.4 is usual"
            )
        return size / known

    def _slope_of(
        self, step: Step, path: Path, t: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function from the state to the cost and its gradient with respect to the state."""
        cost = self.cost
        if isinstance(cost, StateCost):
            return cost.at(step).gradient
        assert isinstance(cost, Cost)
        if not self.skip:
            refuse_memory(step.field, "skip=False asks for a step's velocity again after it")
            evaluate = velocity_of(step.field)

            def exact(x: Tensor) -> tuple[Tensor, Tensor]:
                with torch.inference_mode(False), torch.enable_grad():
                    free = x.clone().requires_grad_()
                    v = evaluate(free, t, **step.condition)
                    data = path.convert(v, free, t, given="velocity", wanted="data")
                    value, slope = cost.gradient(data.detach())
                    (found,) = torch.autograd.grad(data, free, slope)
                return value, found

            return exact
        v = (step.velocity if self.velocity is None else self.velocity(step)).detach()
        # With the velocity fixed the estimate is affine in the state; this is its slope.
        one = torch.ones_like(t)
        rate = path.convert(0 * one, one, t, given="velocity", wanted="data")

        def skipped(x: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = cost.gradient(
                path.convert(v, x, t, given="velocity", wanted="data").detach()
            )
            return value, expand(rate, slope) * slope

        return skipped

    def _watch(self, step: Step, value: Tensor) -> None:
        """Keep the costs, warn where one keeps rising and stop where it runs away."""
        before = self.costs[-1] if self.costs else value
        self.costs.append(value)
        rises = torch.zeros_like(value) if self._rises is None else self._rises
        self._rises = torch.where(value > before, rises + 1, torch.zeros_like(rises))
        first, rising = self.costs[0], self._rises >= 3
        lost = ~torch.isfinite(value)
        if not bool((rising | lost).any()):
            return
        lost |= rising & (value > self.growth * first.clamp(min=1.0))
        if bool(lost.any()):
            row = int(lost.nonzero()[0])
            raise SteeringDivergedError(
                f"steering diverged at step {step.index} (time {step.time:.3g}): the cost of "
                f"sample {row} went from {float(first[row]):.3g} to {float(value[row]):.3g}; "
                f"take a smaller step_size than {self.step_size:g}"
            )
        rising &= value > 2 * first
        if not self._warned and bool(rising.any()):
            self._warned = True
            row = int(rising.nonzero()[0])
            warnings.warn(
                f"steering may diverge: the cost of sample {row} rose three times in a row, from "
                f"{float(first[row]):.3g} at first to {float(value[row]):.3g} at step {step.index} "
                f"(time {step.time:.3g}); a smaller step_size than {self.step_size:g} may help",
                # Past this corrector and the loop that called it.
                stacklevel=5,
            )


def _adam(
    gradient: Tensor, moments: tuple[Tensor, Tensor] | None, count: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The direction of Adam after `count` gradients since its state was new."""
    mean, square = moments or (torch.zeros_like(gradient), torch.zeros_like(gradient))
    mean = torch.lerp(mean, gradient, 0.1)
    square = torch.lerp(square, gradient.square(), 0.001)
    scale = (square / (1 - 0.999**count)).sqrt() + 1e-8
    return mean / (1 - 0.9**count) / scale, (mean, square)
