"""The sampler that goes back to its own noise after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.flows.guided import refuse_turns
from rectiflow.flows.paths import RectifiedPath

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reinterpolation:
    """Each step mixes the estimate of the data with the noise that sampling began with.

    With `D = x + (1 - t) v` the next state is `t' D + (1 - t') noise`, where Euler's method would
    mix in the noise that x implies now. For reflowed models in three to eight steps: it drops the
    drift that earlier steps gathered. It equals Euler's method in one and two steps and on straight
    trajectories. On a bent one it does not approach the ODE's solution however many steps it
    takes, so it is no solver for first flows, for pairs or for inversion.

    Args:
        corrected: average the velocities at both ends of a step (all but the last), as in Heun's
            method; N steps then take 2N - 1 evaluations.

    Source: arXiv 2405.20320, section 4.4 (new update rule).
    """

    corrected: bool = False
    order: int = 1
    run: _Run | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def nodes(self) -> tuple[float, ...]:
        """Fractions of a step at which velocities are taken."""
        return (0.0, 1.0) if self.corrected else (0.0,)

    def bind(self, field: Any) -> Reinterpolation:
        path = getattr(field, "path", None)
        if path is not None and not isinstance(path, RectifiedPath):
            raise ValueError(
                f"re-interpolation goes along straight lines, got a field on the {path.name!r} "
                "path: use euler or heun"
            )
        if self.corrected:
            refuse_turns(field)
        bound = replace(self)
        object.__setattr__(bound, "run", _Run())
        return bound

    def intervals(self, times: Sequence[float]) -> list[float]:
        steps = [after - before for before, after in pairwise(times)]
        if min(steps) < 0:
            raise ValueError(
                "re-interpolation runs forward in time only: times must ascend, use euler or heun "
                "to encode"
            )
        assert self.run is not None
        self.run.grid = list(times)
        return steps

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        run = self.run
        assert run is not None
        # Exact times from the grid: 0 and 1 must not be rounded.
        now, then = run.grid[run.index], run.grid[run.index + 1]
        run.index += 1
        slope = velocity(x, times[0])
        if run.noise is None:
            # At t = 0 the state is the noise; later it is what the first velocity implies.
            run.noise = x - now * slope if now else x
        after = _mix(x, slope, now, then, run.noise)
        if self.corrected and run.index < len(run.grid) - 1:
            mean = 0.5 * (slope + velocity(after, times[1]))
            after = _mix(x, mean, now, then, run.noise)
        return after, slope


@dataclass
class _Run:
    """One integration: its grid, the step it is at, and the noise it began with."""

    grid: list[float] = field(default_factory=list)
    index: int = 0
    noise: Tensor | None = None


def _mix(x: Tensor, slope: Tensor, now: float, then: float, noise: Tensor) -> Tensor:
    data = x + (1 - now) * slope
    return data if then == 1 else then * data + (1 - then) * noise
