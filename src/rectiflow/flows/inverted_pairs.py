"""Real data paired with the noise that a flow assigns to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.flows.couplings import Data, Draw, Pairs, draw_data
from rectiflow.flows.fields import FlowModel, evaluating
from rectiflow.flows.integration import integrate, time_grid
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class InvertedPairs:
    """Pairs of real data with the noise found by following a flow backward from it.

    The targets of `LivePairs` and of stored pairs are a flow's own samples and carry its errors;
    these are the data. Use them for a last, short training after reflow, or to see how well a flow
    inverts. The noise is only as normal as the flow is exact.

    Args:
        teacher: the flow to follow backward; never trained here.
        data: the targets; their conditions go to the teacher.
        steps: steps of the inversion, or a falling grid of times.
        solver: its solver.
        noise: noise level at which an inversion begins, with as much fresh noise mixed into the
            data: at t = 1 exactly a flow is least certain.

    Example:
        >>> model = FlowModel(lambda x, t: torch.zeros_like(x), shape=(2,))
        >>> pairs = InvertedPairs(model, torch.ones(8, 2), noise=0.0).draw(Draw.of(4))
        >>> bool((pairs.source == pairs.target).all())
        True

    Source: arXiv 2405.20320, section 4.3 (configuration G: 128 evaluations, noise 1e-3).
    """

    teacher: FlowModel
    data: Data | Tensor
    steps: int | Sequence[float] = 64
    solver: Any = "heun"
    noise: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be in [0, 1), got {self.noise}")
        falling_times(self.steps, self.noise)

    def draw(self, draw: Draw) -> Pairs:
        target, condition = draw_data(self.data, draw)
        fresh = draw.normal(target.shape[1:])
        with evaluating(self.teacher, draw.device):
            found = invert(
                self.teacher,
                target,
                fresh,
                steps=self.steps,
                solver=self.solver,
                noise=self.noise,
                **condition,
            )
        return Pairs(found, target, condition)


@torch.no_grad()
def invert(
    model: FlowModel,
    target: Float[Tensor, "b *dims"],
    fresh: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] = 64,
    solver: Any = "heun",
    noise: float = 1e-3,
    field: Any = None,
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """The sources that a flow carries to given targets.

    Args:
        model: the flow.
        target: data.
        fresh: standard normal noise, mixed in at the beginning.
        steps: number of steps, or a falling grid of times.
        solver: the solver.
        noise: noise level at the beginning.
        field: a guided field around the model to follow in its place.
        **condition: one row a sample for tensors.
    """
    times = falling_times(steps, noise)
    first = wide(target).new_full((len(target),), times[0])
    start = model.path.interpolate(fresh, target, first).to(target.dtype)
    with evaluating(model):
        end = integrate(field if field is not None else model, start, times, solver, **condition)
    return model.path.source_of(end)


def falling_times(steps: int | Sequence[float], noise: float) -> list[float]:
    """Times from `1 - noise` to 0; a given grid must fall to 0."""
    if isinstance(steps, int):
        count = len(time_grid(steps)) - 1
        return [(1 - noise) * (1 - i / count) for i in range(count)] + [0.0]
    grid = time_grid(steps)
    if grid[-1] != 0.0:
        raise ValueError(f"an inversion goes back to t = 0: its times end at {grid[-1]:g}")
    return grid
