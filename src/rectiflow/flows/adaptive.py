"""Dormand-Prince 5(4): steps as long as the error allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.flows.guided import refuse_memory, refuse_turns
from rectiflow.flows.solvers import RungeKutta, combine
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from torch import Tensor

# The seventh stage is the first of the next step (its row equals the weights).
DOPRI5 = RungeKutta(
    nodes=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    matrix=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    weights=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    order=5,
)
# Fifth-order minus fourth-order weights.
ERROR_WEIGHTS = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)


@dataclass(frozen=True)
class DormandPrince:
    """The adaptive Runge-Kutta pair of Dormand and Prince (RK45 in SciPy).

    The step is shared by the batch and chosen so that the root mean square of the local error,
    relative to `atol + rtol |x|`, stays below one. Use it where accuracy counts more than a known
    number of evaluations: pairs for reflow, likelihoods, references.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.
        max_steps: give up after this many attempted steps in one interval of the grid.

    Source: Dormand and Prince, 1980; step control of Hairer, Nørsett and Wanner, II.4.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000
    order: int = 5

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "max_steps"):
            positive(name, getattr(self, name))

    def bind(self, field: Any) -> DormandPrince:
        refuse_memory(field, "dopri5 takes evaluations back")
        refuse_turns(field)
        return self

    def advance(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        start: float,
        stop: float,
        *,
        dt: float | None = None,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, float, Tensor]:
        """Go from `start` to `stop`, in either direction.

        Args:
            velocity: the right-hand side, `t` of shape `(b,)`.
            x: the state at `start`.
            start: first time.
            stop: last time.
            dt: a first step to try (its size), such as the last one of an earlier call.
            slope: the velocity at `(x, start)` when already known.

        Returns:
            the state at `stop`, the size of the next step to try, and the velocity at `stop`.

        Raises:
            RuntimeError: the step shrank to nothing or `max_steps` was used up.
        """
        direction = 1.0 if stop > start else -1.0
        times = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        slope = velocity(x, torch.full_like(times, start)) if slope is None else slope
        if not x.numel():
            return x, abs(stop - start), slope
        dt = self._first_step(velocity, x, slope, start, stop) if dt is None else dt
        t, rejected = start, False
        for _ in range(self.max_steps):
            remaining = abs(stop - t)
            last = dt >= remaining * (1 - 1e-12)
            size = remaining if last else dt
            slopes = [slope]
            for node, row in zip(DOPRI5.nodes[1:], DOPRI5.matrix[1:]):
                state = combine(x, slopes, row, direction * size)
                # A fresh tensor each time: a field may keep what it is handed.
                slopes.append(velocity(state, torch.full_like(times, t + node * direction * size)))
            error = self._scaled(
                combine(torch.zeros_like(x), slopes, ERROR_WEIGHTS, size), x, state
            )
            if error <= 1:
                x, slope = state, slopes[-1]
                growth = 10.0 if error == 0 else min(10.0, 0.9 * error**-0.2)
                next_dt = size * (min(1.0, growth) if rejected else growth)
                if last:
                    # A step cut short at the end says nothing against the longer one.
                    return x, max(next_dt, dt), slope
                t, dt, rejected = t + direction * size, next_dt, False
            else:
                # A NaN error compares false everywhere and shrinks the step until it is refused.
                dt = size * (max(0.2, 0.9 * error**-0.2) if error == error else 0.1)
                rejected = True
                if dt < 1e-12:
                    raise _stuck(t)
        raise RuntimeError(
            f"dopri5 used {self.max_steps} steps between t={start:.6g} and t={stop:.6g}: "
            "loosen rtol and atol or raise max_steps"
        )

    def _scaled(self, error: Tensor, before: Tensor, after: Tensor) -> float:
        # Squares of half-precision states over their tolerances overflow.
        error, before, after = (wide(value.detach()) for value in (error, before, after))
        scale = self.atol + self.rtol * torch.maximum(before.abs(), after.abs())
        return float((error / scale).square().mean().sqrt())

    def _first_step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        slope: Tensor,
        start: float,
        stop: float,
    ) -> float:
        size = self._scaled(x, x, x)
        speed = self._scaled(slope, x, x)
        if not math.isfinite(size + speed):
            raise _stuck(start)
        trial = 1e-6 if min(size, speed) < 1e-5 else 0.01 * size / speed
        # A slow field suggests a trial beyond the interval, where it need not be defined.
        trial = min(trial, abs(stop - start))
        direction = 1.0 if stop > start else -1.0
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = x.new_full((x.shape[0],), start + direction * trial, dtype=dtype)
        after = velocity(torch.add(x, slope, alpha=direction * trial), t)
        bend = self._scaled(after - slope, x, x) / trial
        if not math.isfinite(bend):
            return trial * 1e-3
        greatest = max(speed, bend)
        guess = max(1e-6, trial * 1e-3) if greatest <= 1e-15 else (0.01 / greatest) ** 0.2
        return min(100 * trial, guess)


def _stuck(t: float) -> RuntimeError:
    """What to raise where no step is small enough."""
    return RuntimeError(
        f"dopri5 cannot go on at t={t:.6g}: the velocity is not finite or changes too fast there; "
        "integrate over a shorter range of times"
    )
