"""How far a flow is from first order: what straightness should measure on curved paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive, unknown
from rectiflow.flows.fields import Field, Velocity, evaluating
from rectiflow.flows.first_order import FirstOrder, ends_through
from rectiflow.flows.integration import Step, integrate, time_grid
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.sampling import condition_rows

if TYPE_CHECKING:
    from jaxtyping import Float

REFERENCES = ("mean", "source")
# Numbers of the noise estimates kept at once: 128 MiB of float32.
KEPT = 1 << 25


@dataclass(frozen=True)
class FirstOrderGap:
    """How much the noise estimate changes along trajectories; all numbers are per dimension.

    Attributes:
        total: the mean over time of the squared distance from the reference.
        per_time: the same in each bin of time.
        times: where the bins begin.
        straightness: the mean over time of the squared distance from the slope of the chord of
            `x / alpha` against NSR: 0 for a straight line in these coordinates, in which the
            path's own curvature is gone.
    """

    total: float
    per_time: Tensor
    times: list[float]
    straightness: float


@torch.no_grad()
def first_order_gap(
    field: Field | Velocity,
    source: Float[Tensor, "b *dims"],
    steps: int | Sequence[float] = 100,
    *,
    bins: int | None = None,
    reference: str = "mean",
    solver: Any = None,
    batch_size: int = 1024,
    **condition: Any,
) -> FirstOrderGap:
    """How far a flow is from one whose first-order steps are exact: `E_t |N(x_t, t) - N̄|² / d`.

    N is the noise that the field estimates along a sampled trajectory and N̄ its mean there. The
    gap is 0 exactly when any number of first-order (DDIM) steps gives the same sample, on every
    path; straightness, in contrast, also counts the curvature of the path itself. A large value in
    a bin of time tells where steps are needed.

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)` on the rectified path.
        source: draws of the source, some thousands for two digits.
        steps: number of equal steps from 0 to 1, or a rising grid of times.
        bins: equal bins of time to average in; each step is its own by default.
        reference: "mean" of the estimates over time, or the "source" itself.
        solver: solver of the trajectories; first-order by default.
        batch_size: samples computed together.
        **condition: one row a sample for tensors.

    Raises:
        ValueError: an unknown reference, a falling grid, or bins without a step.

    Example:
        >>> first_order_gap(lambda x, t: torch.ones_like(x), torch.zeros(2, 3), 4).total
        0.0...

    Source: arXiv 2410.07303, theorem 1; the number is ours.
    """
    positive("batch_size", batch_size)
    if reference not in REFERENCES:
        raise unknown("reference", reference, REFERENCES)
    if source.ndim < 2 or not len(source):
        raise ValueError(f"source must hold samples in rows (b, ...), got {tuple(source.shape)}")
    grid = time_grid(steps)
    path = getattr(field, "path", None) or RectifiedPath()
    rule: Any = solver if solver is not None else FirstOrder(path)
    size = source[0].numel()
    lengths = torch.tensor(grid, dtype=torch.float64, device=source.device).diff()
    weights = lengths / lengths.sum()
    members = _bins(grid, bins)
    batch = max(1, min(batch_size, KEPT // (size * len(lengths))))
    profile, bent = torch.zeros_like(weights), torch.zeros_like(weights)
    with evaluating(field):
        for begin in range(0, len(source), batch):
            part = slice(begin, begin + batch)
            rows = condition_rows(condition, part, len(source))
            seen = _Noises(path)
            start = path.start(source[part])
            end = integrate(field, start, grid, rule, correctors=(seen,), **rows)
            noises = torch.stack(seen.kept).double()
            slope = _chord(path, start, end, grid)
            if reference == "mean":
                centre = torch.tensordot(weights, noises, 1)
            else:
                centre = source[part].double()
            profile += (noises - centre).square().flatten(1).sum(1)
            bent += (noises - slope).square().flatten(1).sum(1)
    profile, bent = profile / (len(source) * size), bent / (len(source) * size)
    shares = [weights[rows].sum() for rows in members]
    binned = [(weights[rows] * profile[rows]).sum() / share for rows, share in zip(members, shares)]
    return FirstOrderGap(
        float((weights * profile).sum()),
        torch.stack(binned),
        [grid[rows[0]] for rows in members],
        float((weights * bent).sum()),
    )


class _Noises:
    """A corrector that keeps the noise estimate at the start of each step."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.kept: list[Tensor] = []

    def __call__(self, step: Step) -> Tensor:
        x = step.before
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = x.new_full((x.shape[0],), step.time, dtype=dtype)
        noise = self.path.convert(step.velocity, x, t, given="velocity", wanted="noise")
        self.kept.append(noise)
        return step.after


def _chord(path: Any, start: Tensor, end: Tensor, grid: Sequence[float]) -> Tensor:
    """The noise of the pair whose path connects the ends of trajectories."""
    first, last = (
        torch.full((len(start),), t, dtype=torch.float64, device=start.device)
        for t in (grid[0], grid[-1])
    )
    return ends_through(path, start.double(), first, end.double(), last)[0]


def _bins(grid: Sequence[float], bins: int | None) -> list[list[int]]:
    """The steps of each bin, by the time at which they start."""
    steps = len(grid) - 1
    if grid[-1] < grid[0]:
        raise ValueError(f"times must rise from noise to data, got {grid[0]:g} to {grid[-1]:g}")
    if bins is None:
        return [[step] for step in range(steps)]
    positive("bins", bins)
    span = grid[-1] - grid[0]
    places = [int((t - grid[0]) / span * bins + 1e-9) for t in grid[:-1]]
    members = [[step for step in range(steps) if places[step] == b] for b in range(bins)]
    if not all(members):
        raise ValueError(f"{bins} bins of time need a step each, the grid has {steps} steps")
    return members
