"""Sampling with gradient: the last steps of a chain keep theirs, at the memory of one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from rectiflow.flows.adaptive import DormandPrince
from rectiflow.flows.fields import velocity_of
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.integration import Corrector, Step, check_inputs, stage_times, time_grid
from rectiflow.flows.solvers import resolve

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def sample_with_gradient(
    field: Any,
    x: Float[Tensor, "b *dims"],
    times: int | Sequence[float] = 50,
    solver: Any = "euler",
    *,
    first: int = 0,
    checkpoint: bool = True,
    correctors: Sequence[Corrector] = (),
    generator: torch.Generator | None = None,
    visit: Callable[[int, float, Tensor], None] | None = None,
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """Follow a field as `integrate` does, with gradient through the steps from `first` on.

    The steps before run without a graph and the state after them is a fresh leaf, so their
    gradient is dropped however they were run. With `checkpoint` every step is computed again while
    going backward: memory grows by one state a step instead of all activations, and the gradient
    is the same to the last bit. Noise of stochastic solvers is replayed, not drawn anew, and it is
    outside the graph (reparameterised).

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)`.
        x: the state at the first time.
        times: a number of equal steps from 0 to 1, or the grid of times.
        solver: name or object, as for `integrate`. The adaptive one takes its steps as given: what
            the step sizes depend on carries no gradient.
        first: index of the first step with gradient, 0 for all.
        checkpoint: compute steps again instead of keeping their activations.
        correctors: called after each step, with gradient.
        generator: randomness for stochastic solvers and correctors.
        visit: called with index, time and state before each step, without gradient.
        **condition: passed on to the field; tensors have one row a sample.

    Raises:
        ValueError: `first` outside the chain, and whatever `integrate` refuses.

    Example:
        >>> theta = torch.tensor(2.0, requires_grad=True)
        >>> x = sample_with_gradient(lambda x, t: theta * x, torch.ones(1, 1), 2, first=1)
        >>> x.sum().backward(); x.item(), theta.grad.item()
        (4.0, 1.0)

    Source: arXiv 2310.03739, section 4.
    """
    grid = time_grid(times)
    steps = len(grid) - 1
    if not 0 <= first < steps:
        raise ValueError(f"first must be a step from 0 to {steps - 1}, got {first}")
    check_inputs(field, x, condition)
    refuse_memory(field, "steps are run apart, and again going backward")
    rule = resolve(solver).bind(field)
    velocity = velocity_of(field)
    velocity = partial(velocity, **condition) if condition else velocity
    advance = _advance(rule, velocity, x, grid)

    def move(rule: Any, index: int, x: Tensor) -> Tensor:
        after, slope = advance(rule, index, x, generator)
        for corrector in correctors:
            start, stop = grid[index], grid[index + 1]
            after = corrector(
                Step(index, start, stop, x, after, slope, field, condition, generator)
            )
        return after

    for index in range(steps):
        if index == first and first:
            x = x.detach()
        if visit is not None:
            visit(index, grid[index], x.detach())
        if index < first:
            with torch.no_grad():
                x = move(rule, index, x)
        elif checkpoint:
            x = recomputed(_Replayed(move, rule, index, generator), x, use_reentrant=False)
        else:
            x = move(rule, index, x)
    return x


def _advance(
    rule: Any, velocity: Callable[..., Tensor], x: Tensor, grid: Sequence[float]
) -> Callable[[Any, int, Tensor, torch.Generator | None], tuple[Tensor, Tensor]]:
    """What carries a state over one step of the grid; it returns the velocity before it too."""
    if isinstance(rule, DormandPrince):
        spans = list(pairwise(grid))
        # The step size to try first in each interval: what the one before ended with.
        tried: dict[int, float | None] = {0: None}

        def between(
            rule: Any, index: int, x: Tensor, generator: torch.Generator | None
        ) -> tuple[Tensor, Tensor]:
            start, stop = spans[index]
            dtype = torch.promote_types(x.dtype, torch.float32)
            moment = x.new_full((x.shape[0],), start, dtype=dtype)
            slope = velocity(x, moment)
            after, dt, _ = rule.advance(velocity, x, start, stop, dt=tried[index], slope=slope)
            tried.setdefault(index + 1, dt)
            return after, slope

        return between
    lengths = rule.intervals(grid)
    stages = stage_times(x, grid, lengths, rule.nodes)

    def one(
        rule: Any, index: int, x: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        return rule.step(velocity, x, stages[index], lengths[index], generator)

    return one


class _Replayed:
    """A step that does the same when it is run again, whatever solver and generator did since."""

    def __init__(
        self,
        move: Callable[[Any, int, Tensor], Tensor],
        rule: Any,
        index: int,
        generator: torch.Generator | None,
    ) -> None:
        self.move, self.rule, self.index, self.generator = move, rule, index, generator
        self.frozen = _twin(rule)
        self.state = None if generator is None else generator.get_state()
        self.ran = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self.ran:
            self.ran = True
            return self.move(self.rule, self.index, x)
        # A rule that counts its steps, and a generator, are ahead by now: take their old state.
        rule = _twin(self.frozen)
        if self.generator is None or self.state is None:
            return self.move(rule, self.index, x)
        later = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            return self.move(rule, self.index, x)
        finally:
            self.generator.set_state(later)


def _twin(rule: Any) -> Any:
    """A copy of a solver with copies of what it keeps between steps; tensors are shared."""
    twin = copy.copy(rule)
    for name, value in getattr(rule, "__dict__", {}).items():
        if not isinstance(value, torch.Tensor):
            object.__setattr__(twin, name, copy.copy(value))
    return twin
