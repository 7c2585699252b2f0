"""How straight, short and reversible a flow is, and how far its samples are from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive, require
from rectiflow.flows.fields import Field, Velocity, evaluating, velocity_of
from rectiflow.flows.first_order_gap import FirstOrderGap as FirstOrderGap
from rectiflow.flows.first_order_gap import first_order_gap as first_order_gap
from rectiflow.flows.integration import Step, integrate, time_grid, uniform_times
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.sampling import condition_rows
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float

# Above this many dimensions nearest assignments say nothing (see `relative_cost`).
MAX_ASSIGNED_DIMENSIONS = 10
# Distances by matrix products would put 1e-8 between equal points.
EXACT = "donot_use_mm_for_euclid_dist"
# Numbers of the velocities kept at once: 128 MiB of float32.
KEPT = 1 << 25


@dataclass(frozen=True)
class Straightness:
    """How far a flow is from straight lines at constant speed.

    Attributes:
        total: S, summed over dimensions; 0 when one Euler step is exact.
        per_dimension: S over the number of dimensions, to compare data sets.
        per_time: the integrand at the start of each step, summed over dimensions.
    """

    total: float
    per_dimension: float
    per_time: Tensor


@torch.no_grad()
def straightness(
    field: Field | Velocity,
    source: Float[Tensor, "b *dims"],
    steps: int | Sequence[float] = 100,
    *,
    solver: Any = "euler",
    batch_size: int = 1024,
    **condition: Any,
) -> Straightness:
    """How much the velocity changes along trajectories: `S = ∫ E|(Z_1 - Z_0) - v(Z_t, t)|² dt`.

    Each reflow should lower it. Trajectories that bend little can be followed in few steps; S = 0
    means that one step is exact. It compares flows on straight-line paths; on curved paths it
    measures the distance from the chord.

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)`.
        source: draws of the source, some thousands for two digits.
        steps: number of equal steps from 0 to 1, or a grid of times.
        solver: solver of the trajectories; the integral takes the value at the start of a step.
        batch_size: samples computed together.
        **condition: one row a sample for tensors.

    Example:
        >>> straightness(lambda x, t: torch.ones_like(x), torch.zeros(2, 3), 4).total
        0.0

    Source: arXiv 2209.03003, section 2.2 (the measure S, by 100 Euler steps).
    """
    positive("batch_size", batch_size)
    _check_rows("source", source)
    grid = time_grid(steps)
    size = source[0].numel()
    batch = max(1, min(batch_size, KEPT // (size * (len(grid) - 1))))
    profile = source.new_zeros(len(grid) - 1, dtype=torch.float64)
    with evaluating(field):
        for begin in range(0, len(source), batch):
            part = slice(begin, begin + batch)
            start = _start(field, source[part])
            rows = condition_rows(condition, part, len(source))
            velocities = _Velocities()
            end = integrate(field, start, grid, solver, correctors=(velocities,), **rows)
            chord = (end - start) / (grid[-1] - grid[0])
            for index, velocity in enumerate(velocities.kept):
                profile[index] += (chord - velocity).double().square().sum()
    profile /= len(source)
    lengths = torch.tensor(grid, dtype=torch.float64).diff().to(profile.device)
    total = float((profile * lengths).sum() / lengths.sum())
    return Straightness(total, total / size, profile)


class _Velocities:
    """A corrector that keeps the velocity at the start of each step."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, step: Step) -> Tensor:
        self.kept.append(step.velocity)
        return step.after


def transport_cost(source: Float[Tensor, "b *dims"], target: Float[Tensor, "b *dims"]) -> float:
    """The mean squared distance between the ends of pairs, summed over dimensions.

    Reflow never raises it on straight-line paths (nor the mean of any other convex cost).

    Example:
        >>> transport_cost(torch.zeros(2, 3), torch.ones(2, 3))
        3.0

    Source: arXiv 2209.03003, theorem 3.5.
    """
    _check_rows("source", source)
    return float((target - source).double().square().flatten(1).sum(1).mean())


def relative_cost(source: Float[Tensor, "b *dims"], target: Float[Tensor, "b *dims"]) -> float:
    """The transport cost of pairs minus that of the best assignment of the same points.

    Zero when the pairs are an optimal transport of each other. Only for at most ten dimensions:
    in more, distances concentrate, and random networks score near zero too.

    Raises:
        ValueError: more than ten dimensions.

    Example:
        >>> relative_cost(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]]))
        1.0

    Source: arXiv 2209.03003, section 5.1 (relative L2 transport cost).
    """
    _check_rows("source", source)
    size = source[0].numel()
    if size > MAX_ASSIGNED_DIMENSIONS:
        raise ValueError(
            f"relative cost needs at most {MAX_ASSIGNED_DIMENSIONS} dimensions, got {size}: in "
            "high dimension it is near 0 even for random networks; use transport_cost"
        )
    require("app", "scipy")
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(source.double().flatten(1), target.double().flatten(1)).square().cpu()
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost.diagonal().mean() - cost[rows, columns].mean())


@torch.no_grad()
def round_trip_error(
    field: Field | Velocity,
    x: Float[Tensor, "b *dims"],
    times: int | Sequence[float] = 50,
    solver: Any = "euler",
    *,
    batch_size: int = 1024,
    **condition: Any,
) -> Float[Tensor, " b"]:
    """How far samples land from themselves after encoding to t = 0 and decoding again.

    The root mean square over the dimensions of each sample. It falls with the solver's error, and
    tells whether inversion and editing can be trusted at this number of steps.

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)`.
        x: samples at the last time.
        times: number of equal steps from 0 to 1, or a rising grid of times.
        solver: the solver of both directions.
        batch_size: samples computed together.
        **condition: one row a sample for tensors.

    Example:
        >>> round_trip_error(lambda x, t: torch.ones_like(x), torch.zeros(2, 3), 1)
        tensor([0., 0.])
    """
    positive("batch_size", batch_size)
    grid = time_grid(times)
    errors = []
    with evaluating(field):
        for begin in range(0, len(x), batch_size):
            part = slice(begin, begin + batch_size)
            rows = condition_rows(condition, part, len(x))
            code = integrate(field, x[part], grid[::-1], solver, **rows)
            back = integrate(field, code, grid, solver, **rows)
            errors.append((back - x[part]).square().flatten(1).mean(1).sqrt())
    return torch.cat(errors) if errors else x.new_zeros(0)


@dataclass(frozen=True)
class Extrapolations:
    """Where each point of a trajectory points to.

    Attributes:
        times: the times of the estimates.
        estimates: `Z_t + (1 - t) v(Z_t, t)`, `(times, b, ...)`.
        drift: mean squared distance of the estimates from the end, summed over dimensions.
    """

    times: list[float]
    estimates: Tensor
    drift: Tensor


@torch.no_grad()
def extrapolations(
    field: Field | Velocity,
    source: Float[Tensor, "b *dims"],
    steps: int | Sequence[float] = 100,
    *,
    solver: Any = "euler",
    **condition: Any,
) -> Extrapolations:
    """The end that one step would reach from each time; constant along a straight trajectory.

    A diagnostic for a few samples, kept in memory as they are, good to plot.

    Example:
        >>> seen = extrapolations(lambda x, t: torch.ones_like(x), torch.zeros(1, 1), 2)
        >>> seen.estimates.flatten().tolist(), seen.drift.tolist()
        ([1.0, 1.0], [0.0, 0.0])

    Source: arXiv 2209.03003, section 5.1 (extrapolation from intermediate times).
    """
    _check_rows("source", source)
    grid = time_grid(steps)
    estimates: list[Tensor] = []

    def point(step: Step) -> Tensor:
        estimates.append(step.before + (grid[-1] - step.time) * step.velocity)
        return step.after

    with evaluating(field):
        end = integrate(
            field, _start(field, source), grid, solver, correctors=(point,), **condition
        )
    stacked = torch.stack(estimates)
    drift = (stacked - end).square().flatten(2).sum(2).mean(1)
    return Extrapolations(grid[:-1], stacked, drift)


def burgers_residual(
    field: Field | Velocity,
    x: Float[Tensor, "b *dims"],
    t: Float[Tensor, " b"],
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """The acceleration along the flow, `dv/dt + (dv/dx) v`, zero where trajectories are straight.

    Computed by one forward-mode product, so gradients flow through it and it may serve as a
    penalty. Networks need forward-mode rules (fused attention has none).

    Example:
        >>> burgers_residual(lambda x, t: x, torch.full((1, 1), 2.0), torch.zeros(1))
        tensor([[2.]])

    Source: arXiv 2209.03003, section 2.2 (straight velocity fields solve Burgers' equation).
    """
    velocity = velocity_of(field)

    def at(state: Tensor, time: Tensor) -> Tensor:
        return velocity(state, time, **condition)

    return torch.func.jvp(at, (x, t), (at(x, t), torch.ones_like(t)))[1]


@torch.no_grad()
def velocity_loss(
    field: Field | Velocity,
    source: Float[Tensor, "b *dims"],
    target: Float[Tensor, "b *dims"],
    steps: int = 100,
    *,
    batch_size: int = 1024,
    **condition: Any,
) -> float:
    """The flow-matching loss of pairs, summed over dimensions, at the middles of equal time steps.

    For the exact field of a coupling this is V, the loss that no network can beat; V and the
    straightness of the new flow make up the fall of the transport cost:
    `E|X_1 - X_0|² - E|Z_1 - Z_0|² = S + V`. V = 0 when the lines between pairs do not cross.

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)` on the rectified path.
        source: one end of the pairs.
        target: the other end.
        steps: number of times, each seen with every pair.
        batch_size: pairs computed together.
        **condition: one row a pair for tensors.

    Example:
        >>> velocity_loss(lambda x, t: torch.ones_like(x), torch.zeros(2, 3), torch.ones(2, 3), 4)
        0.0

    Source: arXiv 2209.03003, section 3.4 (the identity of S and V).
    """
    positive("batch_size", batch_size)
    _check_rows("source", source)
    path = getattr(field, "path", None) or RectifiedPath()
    middles = [t + 0.5 / steps for t in uniform_times(steps)[:-1]]
    total = source.new_zeros((), dtype=torch.float64)
    with evaluating(field):
        for begin in range(0, len(source), batch_size):
            part = slice(begin, begin + batch_size)
            here, there = source[part], target[part]
            rows = condition_rows(condition, part, len(source))
            for middle in middles:
                t = wide(here).new_full((len(here),), middle)
                x = path.interpolate(here, there, t)
                wrong = velocity_of(field)(x, t, **rows) - path.velocity(here, there, t)
                total += wrong.double().square().sum()
    return float(total / (len(source) * steps))


@torch.no_grad()
def energy_distance(
    x: Float[Tensor, "n *dims"], y: Float[Tensor, "m *dims"], *, chunk: int = 4096
) -> float:
    """The energy distance of two samples: `2 E|X - Y| - E|X - X'| - E|Y - Y'|`, never negative.

    Needs no features and no density; good for points in a few dimensions. Two samples of n points
    of one distribution differ by about 1/n.

    Example:
        >>> energy_distance(torch.zeros(2, 1), torch.ones(3, 1))
        2.0

    Source: Székely and Rizzo, 2013, equation 2.5 (with all pairs, including equal ones).
    """
    _check_rows("x", x)
    _check_rows("y", y)
    first, second = x.double().flatten(1), y.double().flatten(1)
    between = _mean_distance(first, second, chunk)
    within = _mean_distance(first, first, chunk) + _mean_distance(second, second, chunk)
    return max(0.0, float(2 * between - within))


def _mean_distance(x: Tensor, y: Tensor, chunk: int) -> Tensor:
    sums = [torch.cdist(part, y, compute_mode=EXACT).sum() for part in x.split(chunk)]
    return torch.stack(sums).sum() / math.prod((len(x), len(y)))


def _start(field: Any, source: Tensor) -> Tensor:
    """The state at t = 0 of sources: scaled where the field's path says so."""
    path = getattr(field, "path", None)
    return source if path is None else path.start(source)


def _check_rows(name: str, points: Tensor) -> None:
    if points.ndim < 2 or not len(points):
        raise ValueError(f"{name} must hold samples in rows (b, ...), got {tuple(points.shape)}")
