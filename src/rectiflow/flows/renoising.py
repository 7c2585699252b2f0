"""The sampler of few-step generators: estimate the data, add fresh noise for the next time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.flows.paths import Path, expand
from rectiflow.flows.solvers import fresh_noise

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Renoise:
    """Jump to the estimate of the data, then back onto the path with noise of its own.

    `x_next = alpha(t') D(x, t) + sigma(t') fresh noise`, and `D` itself at t' = 1. This is how a
    generator that was trained to give data from a few fixed times is sampled (distribution
    matching, consistency models); for an ordinary flow it is far worse than Euler. One step is the
    estimate at t = 0, on every path. Forward in time only.

    Args:
        path: the field's path; taken from the field when it has one.

    Raises:
        ValueError: when used with a field without a path, or on falling times.

    Example:
        >>> from rectiflow.flows import FlowModel, integrate
        >>> model = FlowModel(lambda x, t: torch.full_like(x, 3.0), prediction="data")
        >>> integrate(model, torch.ones(1, 1), [0.0, 0.5, 1.0], Renoise())
        tensor([[3.]])

    Source: arXiv 2303.01469, algorithm 1 (multistep sampling); arXiv 2405.14867, section 4.4.
    """

    path: Path | None = None
    nodes: tuple[float, ...] = (0.0, 1.0)
    order: int = 1
    stochastic: ClassVar[bool] = True

    def bind(self, field: Any) -> Renoise:
        path = self.path or getattr(field, "path", None)
        if path is None:
            raise ValueError(
                "the renoise solver needs the field's path: pass a Field such as FlowModel, or "
                "Renoise(path=...)"
            )
        return replace(self, path=path)

    def intervals(self, times: Sequence[float]) -> list[float]:
        steps = [after - before for before, after in pairwise(times)]
        if min(steps) < 0:
            raise ValueError("the renoise solver runs forward in time only: times must ascend")
        return steps

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert self.path is not None
        t, after = times
        v = velocity(x, t)
        data = self.path.convert(v, x, t, given="velocity", wanted="data")
        fresh = fresh_noise(x, generator)
        renoised = self.path.interpolate(fresh, data, after)
        # Paths that never quite reach the data would leave a trace of noise in the samples.
        return torch.where(expand(after, x) >= 1, data, renoised).to(x.dtype), v
