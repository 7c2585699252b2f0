"""Grids of times fitted to a model: short steps where its trajectories bend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.flows.fields import Field, FlowModel, evaluating
from rectiflow.flows.integration import Step, integrate, uniform_times
from rectiflow.flows.sampling import draw_source

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@torch.no_grad()
def adaptive_times(
    model: FlowModel | Field,
    steps: int,
    *,
    source: Float[Tensor, "b *dims"] | None = None,
    samples: int = 256,
    fine: int = 100,
    uniform: float = 0.1,
    generator: torch.Generator | None = None,
    **condition: Any,
) -> list[float]:
    """The times of `steps` Euler steps that share the model's measured error equally.

    A step of length h at time t errs by `h² m(t) / 2`, with m the size of the acceleration `dv/dt`
    along trajectories. Equal errors, which are also the least in sum, want steps of length
    proportional to `m^(-1/2)`: the grid cuts the cumulative of `sqrt(m)` into equal parts. Measured
    once on some hundred samples; keep it with the model as `model.sampling["steps"] = times`. It
    gains where the bending is uneven over time (a variance-preserving path), and nothing where it
    is even, as on most straight paths. Errors add up differently from how they arise, so compare
    with equal steps before you keep it; `rectiflow grid` does.

    Args:
        model: the model, or any `Field` if `source` is given.
        steps: the budget: number of Euler steps.
        source: noises to measure on; drawn from `generator` otherwise.
        samples: how many to draw.
        fine: Euler steps of the measurement.
        uniform: share of the steps spread evenly, a safeguard against errors of the measurement.
        generator: the source of randomness.
        **condition: one row a sample for tensors.

    Returns:
        `steps + 1` rising times from 0 to 1.

    Raises:
        ValueError: a number out of range, a field without noises, or velocities that are not
            finite.

    Example:
        >>> model = FlowModel(lambda x, t: (3 * t[:, None]).exp(), shape=(1,))
        >>> [round(t, 2) for t in adaptive_times(model, 2, uniform=0.0)]
        [0.0, 0.67, 1.0]
    """
    positive("steps", steps)
    positive("samples", samples)
    if not 0 <= uniform <= 1:
        raise ValueError(f"uniform must be in [0, 1], got {uniform}")
    if fine < 2:
        raise ValueError(f"fine must be >= 2 to see a velocity change, got {fine}")
    if source is None:
        if not isinstance(model, FlowModel):
            raise ValueError(f"source= is needed for a {type(model).__name__}: no shape is known")
        source = draw_source(model, samples, generator=generator)
    density = error_density(model, source, fine, **condition)
    total = density.mean()
    if not bool(torch.isfinite(total)):
        raise ValueError("the model's velocities are not finite: check its weights")
    flat = torch.full_like(density, 1.0)
    density = uniform * flat + (1 - uniform) * (density / total if total > 0 else flat)
    return _cut(density, steps)


def error_density(
    model: FlowModel | Field, source: Float[Tensor, "b *dims"], fine: int, **condition: Any
) -> Float[Tensor, " fine"]:
    """The root of the acceleration's size in each of `fine` equal intervals, in float64."""
    changes = torch.zeros(fine, dtype=torch.float64)
    last: list[Tensor] = []

    def watch(step: Step) -> Tensor:
        if last:
            changes[step.index - 1] = (step.velocity - last.pop()).double().square().mean()
        last.append(step.velocity)
        return step.after

    with evaluating(model):
        start = model.path.start(source)
        integrate(model, start, uniform_times(fine), "euler", correctors=(watch,), **condition)
    # The velocity at t = 1 itself, which would close the last interval, is unbounded for some.
    changes[-1] = changes[-2]
    # The fourth root of the mean square is the root of the root mean square.
    return (changes * fine**2) ** 0.25


def _cut(density: Tensor, steps: int) -> list[float]:
    """Times that cut the integral of a piecewise constant density into equal parts."""
    heights: Sequence[float] = density.tolist()
    cumulative, fine = [0.0], len(heights)
    for height in heights:
        cumulative.append(cumulative[-1] + height / fine)
    times, cell = [0.0], 0
    for part in range(1, steps):
        wanted = cumulative[-1] * part / steps
        while cumulative[cell + 1] < wanted:
            cell += 1
        inside = (wanted - cumulative[cell]) / (cumulative[cell + 1] - cumulative[cell])
        times.append((cell + inside) / fine)
    return [*times, 1.0]
