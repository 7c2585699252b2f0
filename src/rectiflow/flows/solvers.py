"""Fixed-step solvers: small records with one `step`, driven by `integrate`.

An explicit Runge-Kutta method is data (nodes, matrix, weights); one runner steps them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rectiflow.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor


class Solver(Protocol):
    """One step of a fixed-step method.

    Attributes:
        nodes: fractions of a step at which `step` receives times.
        order: order of convergence; half the step gives about `2^-order` of the error.
    """

    nodes: tuple[float, ...]
    order: int

    def bind(self, field: Any) -> Solver:
        """The solver for this field; raises ValueError when the field lacks what it needs."""

    def intervals(self, times: Sequence[float]) -> list[float]:
        """The step lengths for a grid of times."""

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """The next state and the velocity at the present one; `times` has one entry a node."""


def advance(x: Tensor, slope: Tensor, dt: float | Tensor) -> Tensor:
    """`x + dt slope` in one kernel."""
    if isinstance(dt, float):
        return torch.add(x, slope, alpha=dt)
    return torch.addcmul(x, slope, dt)


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method given by its tableau.

    Args:
        nodes: c, the fractions of the step at which slopes are taken.
        matrix: a, one row a stage with the weights of the earlier slopes.
        weights: b, the weights of the slopes in the step.
        order: the order of convergence.
        legacy_dt: use steps of `1/N` whatever the grid, as the official code of rectified flow
            does on its grid from 1e-3 to 1; only for parity with checkpoints distilled there.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int
    legacy_dt: bool = False

    def bind(self, field: Any) -> RungeKutta:
        return self

    def intervals(self, times: Sequence[float]) -> list[float]:
        steps = [after - before for before, after in pairwise(times)]
        if self.legacy_dt:
            return [(1 if dt > 0 else -1) / len(steps) for dt in steps]
        return steps

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        slopes: list[Tensor] = []
        for row, time in zip(self.matrix, times):
            slopes.append(velocity(combine(x, slopes, row, dt), time))
        return combine(x, slopes, self.weights, dt), slopes[0]


def combine(
    x: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], dt: float | Tensor
) -> Tensor:
    """`x + dt sum(weights slopes)`, skipping zero weights."""
    for slope, weight in zip(slopes, weights):
        if weight:
            x = advance(x, slope, dt * weight)
    return x


EULER = RungeKutta(nodes=(0.0,), matrix=((),), weights=(1.0,), order=1)
MIDPOINT = RungeKutta(nodes=(0.0, 0.5), matrix=((), (0.5,)), weights=(0.0, 1.0), order=2)
HEUN = RungeKutta(nodes=(0.0, 1.0), matrix=((), (1.0,)), weights=(0.5, 0.5), order=2)
RK4 = RungeKutta(
    nodes=(0.0, 0.5, 0.5, 1.0),
    matrix=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    order=4,
)


def names() -> list[str]:
    """The solvers that can be asked for by name."""
    return ["dopri5", "euler", "heun", "heun-euler", "midpoint", "rk4", "sde"]


def resolve(solver: Any) -> Any:
    """The solver of a name; a solver object is returned as it is.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> resolve("rk4").order
        4
    """
    if not isinstance(solver, str):
        return solver
    fixed = {"euler": EULER, "heun": HEUN, "midpoint": MIDPOINT, "rk4": RK4}
    if solver in fixed:
        return fixed[solver]
    if solver == "dopri5":
        from rectiflow.flows.adaptive import DormandPrince

        return DormandPrince()
    if solver == "heun-euler":
        from rectiflow.flows.heun_euler import HeunEuler

        return HeunEuler()
    if solver == "sde":
        from rectiflow.flows.stochastic import StochasticEuler

        return StochasticEuler()
    raise unknown("solver", solver, names())
