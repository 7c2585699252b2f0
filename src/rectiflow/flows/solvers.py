"""Fixed-step solvers: small records with one `step`, driven by `integrate`.

An explicit Runge-Kutta method is data (nodes, matrix, weights); one runner steps them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rectiflow.errors import unknown
from rectiflow.flows.guided import refuse_turns

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
        if 1.0 in self.nodes:
            refuse_turns(field)
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


def refuse_noise(solver: Any, reason: str) -> None:
    """Raise ValueError for a solver whose steps are random, where that cannot be right."""
    if getattr(resolve(solver), "stochastic", False):
        named = solver if isinstance(solver, str) else type(solver).__name__
        raise ValueError(f"{reason}: take an ODE solver (euler, heun, rk4, dopri5), not {named}")


def fresh_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers like x, drawn on the generator's own device."""
    device = x.device if generator is None else generator.device
    drawn = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return drawn.to(x.device, non_blocking=True)


EULER = RungeKutta(nodes=(0.0,), matrix=((),), weights=(1.0,), order=1)
MIDPOINT = RungeKutta(nodes=(0.0, 0.5), matrix=((), (0.5,)), weights=(0.0, 1.0), order=2)
HEUN = RungeKutta(nodes=(0.0, 1.0), matrix=((), (1.0,)), weights=(0.5, 0.5), order=2)
RK4 = RungeKutta(
    nodes=(0.0, 0.5, 0.5, 1.0),
    matrix=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    order=4,
)


@dataclass(frozen=True, init=False)
class RFSolver(RungeKutta):
    """The second-order step of RF-Solver, for sampling and for faithful inversion.

    With `v = v(x, t)` and a trial move by the share theta of the step h,

        `x' = x + h [(1 - 1/(2 theta)) v + 1/(2 theta) v(x + theta h v, t + theta h)]`.

    The paper expands the velocity along the trajectory and estimates its derivative by the
    difference of the two velocities; collected, that is this step, which keeps digits in half
    precision that the difference quotient loses. theta = 1/2 (the released code) is the explicit
    midpoint rule, theta = 1 Heun's method and theta = 2/3 Ralston's: "RF-Solver" is a derivation
    of these. Two evaluations a step and order 2 for every theta; following a flow backward and
    forward again on one grid errs by order 3, as leading terms cancel. Grids need not be even.
    With theta below 1 sampling never asks the field at t = 1, but inversion begins there.

    Args:
        theta: where in the step the second velocity is taken, in (0, 1].

    Raises:
        ValueError: theta outside (0, 1].

    Example:
        >>> RFSolver(1.0).weights == HEUN.weights, RFSolver().weights == MIDPOINT.weights
        (True, True)
        >>> resolve("rf-solver:0.75").theta
        0.75

    Source: arXiv 2411.04746, section 3.2. The paper's step of order n adds higher differences;
        `rk4` is the better buy there.
    """

    theta: float = 0.5

    def __init__(self, theta: float = 0.5) -> None:
        if not 0 < theta <= 1:
            raise ValueError(f"theta must be in (0, 1], got {theta}")
        second = 1 / (2 * theta)
        super().__init__((0.0, theta), ((), (theta,)), (1 - second, second), 2)
        object.__setattr__(self, "theta", theta)

    @property
    def spec(self) -> str:
        """The words that name this solver."""
        return "rf-solver" if self.theta == 0.5 else f"rf-solver:{self.theta!r}"


FIXED = {"euler": EULER, "heun": HEUN, "midpoint": MIDPOINT, "rk4": RK4}
# Solvers with a file of their own: the file, the class, its settings.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dopri5": ("adaptive", "DormandPrince", {}),
    "first-order": ("first_order", "FirstOrder", {}),
    "heun-euler": ("heun_euler", "HeunEuler", {}),
    "implicit-midpoint": ("implicit_midpoint", "ImplicitMidpoint", {}),
    "reinterpolate": ("reinterpolation", "Reinterpolation", {}),
    "reinterpolate-heun": ("reinterpolation", "Reinterpolation", {"corrected": True}),
    "renoise": ("renoising", "Renoise", {}),
    "rf-solver": ("solvers", "RFSolver", {}),
    "sde": ("stochastic", "StochasticEuler", {}),
}
# Solvers that take a number after a colon: its type and what it is called.
NUMBERED: dict[str, tuple[type, str]] = {
    "implicit-midpoint": (int, "iterations"),
    "rf-solver": (float, "theta"),
}


def names() -> list[str]:
    """The solvers that can be asked for by name."""
    return sorted([*FIXED, *OTHERS])


def resolve(solver: Any) -> Any:
    """The solver of a name; a solver object is returned as it is.

    Args:
        solver: one of `names()`, where `rf-solver:THETA` and `implicit-midpoint:ITERATIONS` carry
            a number, or a solver.

    Raises:
        ValueError: an unknown name, or a number that the solver does not take.

    Example:
        >>> resolve("rk4").order
        4
    """
    if not isinstance(solver, str):
        return solver
    name, colon, number = solver.partition(":")
    if colon and name in NUMBERED:
        return _numbered(name, number)
    if solver in FIXED:
        return FIXED[solver]
    if solver in OTHERS:
        file, kind, settings = OTHERS[solver]
        return getattr(importlib.import_module(f"rectiflow.flows.{file}"), kind)(**settings)
    if colon and name in names():
        raise ValueError(f"the solver {name!r} takes no number, got {solver!r}")
    raise unknown("solver", solver, names())


def _numbered(name: str, number: str) -> Any:
    """The solver of a name and the number after it."""
    kind, meaning = NUMBERED[name]
    try:
        value = kind(number)
    except ValueError:
        raise ValueError(
            f"the solver {name}:{number} is not understood: it takes {name}:{meaning.upper()}"
        ) from None
    file, made, settings = OTHERS[name]
    module = importlib.import_module(f"rectiflow.flows.{file}")
    return getattr(module, made)(**{**settings, meaning: value})
