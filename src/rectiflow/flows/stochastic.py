"""The stochastic sampler: noise along the way, the same distributions at every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.errors import positive
from rectiflow.flows.paths import Path, expand
from rectiflow.flows.solvers import fresh_noise

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StochasticEuler:
    """Euler-Maruyama on the SDE whose marginals equal those of the field's ODE.

    `dZ = (v + g²/2 score) dt + g dW` with `g = scale sigma(t)`, where the score of a source
    N(0, std² I) is `-noise / (sigma std²)`. The noise may correct errors of earlier steps, at the
    price of more steps. Forward in time only.

    Args:
        scale: strength of the noise; 0 is the Euler method.
        source_std: standard deviation of the source.
        path: the field's path; taken from the field when it has one.

    Source: arXiv 2209.03003, section 2.3 (relation to SDEs). The drift of the official sampler,
        `v + scale²/(2 std²) (t (1-t) v/2 - (2-t) x/2)`, does not keep the marginals; this one does.
    """

    scale: float = 1.0
    source_std: float = 1.0
    path: Path | None = None
    nodes: tuple[float, ...] = (0.0,)
    order: int = 1
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("scale", self.scale, zero=True)
        positive("source_std", self.source_std)

    def bind(self, field: Any) -> StochasticEuler:
        path = self.path or getattr(field, "path", None)
        if path is None:
            raise ValueError(
                "the sde solver needs the field's path: pass a Field such as FlowModel, "
                "or StochasticEuler(path=...)"
            )
        return replace(self, path=path)

    def intervals(self, times: Sequence[float]) -> list[float]:
        steps = [after - before for before, after in pairwise(times)]
        if min(steps) < 0:
            raise ValueError("the sde solver runs forward in time only: times must ascend")
        return steps

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        (t,) = times
        v = velocity(x, t)
        mean, std = self.moments(v, x, t, dt)
        fresh = fresh_noise(x, generator)
        # Times are float32 at least; the state keeps its own dtype.
        return (mean + std * fresh).to(x.dtype), v

    def moments(self, v: Tensor, x: Tensor, t: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state, given the velocity at `(x, t)`.

        A step is a normal distribution, so chains have a probability that can be differentiated.
        The solver must be bound to a field or know its path.
        """
        assert self.path is not None
        noise = self.path.convert(v, x, t, given="velocity", wanted="noise")
        sigma = self.path.sigma(expand(t, x))
        drift = v - (0.5 * self.scale**2 / self.source_std**2) * sigma * noise
        return x + dt * drift, self.scale * math.sqrt(dt) * sigma
