"""The sampler that goes back to its own noise after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rectiflow.flows.paths import RectifiedPath

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reinterpolation:
    """Each step mixes the estimate of the data with the noise that sampling began with.

    With `D = x + (1 - t) v` the next state is `t' D + (1 - t') noise`, where Euler's method would
    mix in the noise that x implies now. For reflowed models in two to five steps: it drops the
    drift that earlier steps gathered. It equals Euler's method in one step and on straight
    trajectories. On a bent one it does not approach the ODE's solution however many steps it
    takes, so it is no solver for first flows, for pairs or for inversion.

    Args:
        corrected: average the velocities at both ends of a step (all but the last), as in Heun's
            method; N steps then take 2N - 1 evaluations.

    Source: arXiv 2405.20320, section 4.4 (new update rule).
    """

    corrected: bool = False
    order: int = 1

    @property
    def nodes(self) -> tuple[float, ...]:
        """Fractions of a step at which velocities are taken."""
        return (0.0, 1.0) if self.corrected else (0.0,)

    def bind(self, field: Any) -> _Bound:
        path = getattr(field, "path", None)
        if path is not None and not isinstance(path, RectifiedPath):
            raise ValueError(
                f"re-interpolation goes along straight lines, got a field on the {path.name!r} "
                "path: use euler or heun"
            )
        return _Bound(self.corrected, self.nodes, self.order)


@dataclass
class _Bound:
    """One integration: the grid, the step it is at, and the noise it began with."""

    corrected: bool
    nodes: tuple[float, ...]
    order: int
    grid: list[float] = field(default_factory=list)
    index: int = 0
    noise: Tensor | None = None

    def bind(self, field: Any) -> _Bound:
        return self

    def intervals(self, times: Sequence[float]) -> list[float]:
        steps = [after - before for before, after in pairwise(times)]
        if min(steps) < 0:
            raise ValueError(
                "re-interpolation runs forward in time only: times must ascend, use euler or heun "
                "to encode"
            )
        self.grid, self.index, self.noise = list(times), 0, None
        return steps

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: Any = None,
    ) -> tuple[Tensor, Tensor]:
        # Exact times from the grid: 0 and 1 must not be rounded.
        now, then = self.grid[self.index], self.grid[self.index + 1]
        self.index += 1
        slope = velocity(x, times[0])
        if self.noise is None:
            # At t = 0 the state is the noise; later it is what the first velocity implies.
            self.noise = x - now * slope if now else x
        after = self._mix(x, slope, now, then)
        if self.corrected and self.index < len(self.grid) - 1:
            mean = 0.5 * (slope + velocity(after, times[1]))
            after = self._mix(x, mean, now, then)
        return after, slope

    def _mix(self, x: Tensor, slope: Tensor, now: float, then: float) -> Tensor:
        data = x + (1 - now) * slope
        return data if then == 1 else then * data + (1 - then) * self.noise
