"""Follow a field from one time to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.flows.adaptive import DormandPrince
from rectiflow.flows.fields import Field, Velocity, velocity_of
from rectiflow.flows.guided import begun
from rectiflow.flows.solvers import Solver, resolve

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Step:
    """What a corrector is told after a step.

    Attributes:
        index: number of the step, from 0.
        time: time before the step.
        next_time: time after the step.
        before: state before the step.
        after: state after the step, which the corrector may replace.
        velocity: the velocity at `(before, time)`.
        field: the field that is integrated.
        condition: its condition.
        generator: the generator given to `integrate`.
    """

    index: int
    time: float
    next_time: float
    before: Tensor
    after: Tensor
    velocity: Tensor
    field: Any
    condition: dict[str, Any]
    generator: torch.Generator | None


Corrector = Callable[[Step], Tensor]


class Trajectory:
    """A corrector that changes nothing and keeps every state.

    Attributes:
        times: the times of the states, the first one included.
        states: the states, `(b, ...)` each.

    Example:
        >>> seen = Trajectory()
        >>> _ = integrate(lambda x, t: x * 0 + 1, torch.zeros(1, 1), 2, correctors=(seen,))
        >>> seen.times, [s.item() for s in seen.states]
        ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0])
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, step: Step) -> Tensor:
        if not self.states:
            self.times.append(step.time)
            self.states.append(step.before)
        self.times.append(step.next_time)
        self.states.append(step.after)
        return step.after


def uniform_times(steps: int, *, start: float = 0.0, stop: float = 1.0) -> list[float]:
    """`steps + 1` equally spaced times from `start` to `stop`, both exact.

    Raises:
        ValueError: fewer than one step.

    Example:
        >>> uniform_times(4, start=1, stop=0)
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return [start + (stop - start) * i / steps for i in range(steps)] + [float(stop)]


def integrate(
    field: Field | Velocity,
    x: Float[Tensor, "b *dims"],
    times: int | Sequence[float] | Float[Tensor, " n"] = 50,
    solver: str | Solver | DormandPrince = "euler",
    *,
    correctors: Sequence[Corrector] = (),
    generator: torch.Generator | None = None,
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """Follow a field from the first time to the last and return the state there.

    Ascending times generate (source to target); descending times encode with the same field. The
    caller's gradient mode is respected: gradients flow through every step unless they are
    switched off. Inputs are never written to.

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)` with `t` of shape `(b,)`.
        x: the state at the first time.
        times: a number of equal steps from 0 to 1, or the grid of times itself. For the adaptive
            solver the grid is where correctors look in; two times are enough.
        solver: euler, first-order, heun, midpoint, rk4, dopri5, sde, or a solver object.
        correctors: called after each step with a `Step`; each returns the state to go on from.
        generator: randomness for stochastic solvers and correctors.
        **condition: passed on to the field; tensors have one row a sample.

    Raises:
        ValueError: times that are not monotone in [0, 1], a condition whose rows do not match, or
            an unknown solver.

    Example:
        >>> z = integrate(lambda x, t: 2 * x, torch.ones(3, 1), 100, "rk4")
        >>> round(z[0].item(), 4)
        7.3891

    Source: arXiv 2209.03003, algorithm 1 (and section 2.1 for the reverse direction).
    """
    grid = time_grid(times)
    check_inputs(field, x, condition)
    rule = resolve(solver).bind(field)
    field = begun(field)
    velocity = velocity_of(field)
    if condition:
        velocity = partial(velocity, **condition)
    if isinstance(rule, DormandPrince):
        return _adaptive(field, velocity, x, grid, rule, correctors, generator, condition)
    lengths = rule.intervals(grid)
    stages = stage_times(x, grid, lengths, rule.nodes)
    for index, (dt, moments) in enumerate(zip(lengths, stages)):
        before = x
        x, slope = rule.step(velocity, x, moments, dt, generator)
        start, stop = grid[index], grid[index + 1]
        for corrector in correctors:
            x = corrector(Step(index, start, stop, before, x, slope, field, condition, generator))
    return x


def stage_times(
    x: Tensor, grid: Sequence[float], lengths: Sequence[float], nodes: Sequence[float]
) -> list[tuple[Tensor, ...]]:
    """The `(b,)` time tensors of every stage of every step, made at once and without copies."""
    # Half-precision times would merge neighbouring steps of a fine grid.
    dtype = torch.promote_types(x.dtype, torch.float32)
    start = torch.tensor(grid[:-1], dtype=torch.float64).unsqueeze(1)
    length = torch.tensor(lengths, dtype=torch.float64).unsqueeze(1)
    values = start + length * torch.tensor(nodes, dtype=torch.float64)
    table = values.flatten().to(x.device, dtype).unsqueeze(-1).expand(-1, x.shape[0])
    # One unbind for the whole table: one a step would cost as much as the step's update.
    return list(zip(*[iter(table.unbind(0))] * len(nodes)))


def _adaptive(
    field: Any,
    velocity: Velocity,
    x: Tensor,
    grid: list[float],
    solver: DormandPrince,
    correctors: Sequence[Corrector],
    generator: torch.Generator | None,
    condition: dict[str, Any],
) -> Tensor:
    dt: float | None = None
    slope: Tensor | None = None
    for index, (start, stop) in enumerate(pairwise(grid)):
        before = x
        if correctors and slope is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            slope = velocity(x, x.new_full((x.shape[0],), start, dtype=dtype))
        first = slope
        x, dt, slope = solver.advance(velocity, x, start, stop, dt=dt, slope=slope)
        for corrector in correctors:
            assert first is not None
            corrected = corrector(
                Step(index, start, stop, before, x, first, field, condition, generator)
            )
            slope = slope if corrected is x else None
            x = corrected
    return x


def time_grid(times: int | Sequence[float] | Tensor) -> list[float]:
    if isinstance(times, int):
        return uniform_times(times)
    grid = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    steps = [after - before for before, after in pairwise(grid)]
    monotone = all(s > 0 for s in steps) or all(s < 0 for s in steps)
    if not steps or not monotone or min(grid) < 0 or max(grid) > 1:
        shown = ", ".join(f"{t:g}" for t in grid[:6])
        raise ValueError(
            "times must be two or more strictly rising (or falling) numbers in [0, 1], "
            f"got [{shown}{', ...' if len(grid) > 6 else ''}]"
        )
    return grid


def check_inputs(field: Any, x: Tensor, condition: dict[str, Any]) -> None:
    if not x.is_floating_point():
        raise ValueError(f"states must be floating point, got {x.dtype}")
    for name, value in condition.items():
        if isinstance(value, Tensor) and value.ndim and value.shape[0] != x.shape[0]:
            raise ValueError(
                f"condition {name!r} must have one row for each of the {x.shape[0]} samples, "
                f"got shape {tuple(value.shape)}"
            )
    check = getattr(field, "check", None)
    if check is not None:
        check(x, **condition)
