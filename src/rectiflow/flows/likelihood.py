"""How likely a sample is under a flow, by the change of variables along its trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive, unknown
from rectiflow.flows.fields import Field, Velocity, evaluating, velocity_of
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.integration import check_inputs, integrate, time_grid
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.sampling import condition_rows

if TYPE_CHECKING:
    from jaxtyping import Float

# Numbers in one chunk of basis vectors: 64 MiB of float32 a copy.
CHUNK = 1 << 24


@torch.no_grad()
def log_likelihood(
    field: Field | Velocity,
    x: Float[Tensor, "b *dims"],
    times: int | Sequence[float] | Float[Tensor, " n"] = 50,
    solver: Any = "rk4",
    *,
    divergence: str = "exact",
    probes: int = 1,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    **condition: Any,
) -> Float[Tensor, " b"]:
    """The log-density of samples under a flow that starts from standard normal noise, in nats.

    The state and its log-density travel back to t = 0 together: `dx = v dt` and
    `d log p = -div v dt`, with the density of `N(0, sigma(0)² I)` there. The exact divergence costs
    one backward pass a dimension in each evaluation; the Hutchinson estimate costs one a probe and
    is unbiased along a given trajectory, but its exponential is not. With a fixed-step solver the
    result of a sample does not depend on the others; the steps of dopri5 are shared by a batch, so
    that results agree within its tolerance only. For densities of 8-bit images, dequantise first.

    Args:
        field: a `Field`, or any callable `velocity(x, t, **condition)` on the rectified path,
            that treats the rows of a batch apart.
        x: samples at the last of the times, t = 1 unless a grid says otherwise.
        times: a number of equal steps, or a grid that reaches t = 0, in either order. End it a
            little below 1 for a path of unbounded velocity there (VP, VE, constant-speed VP).
        solver: any solver but the stochastic one; see `integrate`.
        divergence: exact or hutchinson.
        probes: random vectors of +1 and -1 in the estimate, kept along the trajectory.
        batch_size: samples computed together.
        generator: randomness of the probes.
        **condition: one row a sample for tensors.

    Returns:
        one log-density a sample.

    Raises:
        ValueError: an unknown divergence, a grid that does not reach 0, no probes.

    Example:
        >>> standard = log_likelihood(lambda x, t: 0 * x, torch.zeros(1, 2), 1, "euler")
        >>> round(standard.item(), 4)
        -1.8379

    Source: arXiv 1806.07366, equation 8; arXiv 1810.01367, section 3.1 (Hutchinson's estimate).
    """
    if divergence not in ("exact", "hutchinson"):
        raise unknown("divergence", divergence, ("exact", "hutchinson"))
    positive("probes", probes)
    positive("batch_size", batch_size)
    check_inputs(field, x, condition)
    refuse_memory(field, "a likelihood evaluates the field in an order of its own")
    grid = sorted(time_grid(times), reverse=True)
    if grid[-1] != 0:
        raise ValueError(f"likelihoods need times that reach 0, got {grid[-1]:g} to {grid[0]:g}")
    signs = _signs(x, probes, generator) if divergence == "hutchinson" else None
    path = getattr(field, "path", None) or RectifiedPath()
    spread = path.start_scale(x)
    parts = []
    with evaluating(field):
        for begin in range(0, len(x), batch_size):
            part = slice(begin, begin + batch_size)
            rows = condition_rows(condition, part, len(x))
            velocity = partial(velocity_of(field), **rows)
            vectors = signs[part].movedim(1, 0) if signs is not None else None
            parts.append(_along(velocity, x[part], grid, solver, vectors, spread))
    return torch.cat(parts) if parts else x.new_zeros(0)


def bits_per_dim(
    log_likelihood: Float[Tensor, " b"], dimensions: int, *, levels: int | None = 256
) -> Float[Tensor, " b"]:
    """Log-densities in nats as bits per dimension, the lower the better.

    Args:
        log_likelihood: nats, of samples in [-1, 1].
        dimensions: numbers in one sample.
        levels: grey levels of the data, which were dequantised by uniform noise of one level;
            None for data that are continuous as they are.

    Example:
        >>> bits_per_dim(torch.zeros(1), 3)
        tensor([7.])

    Source: arXiv 1705.07057, section 4.3 (with the interval [-1, 1] in the place of [0, 1]).
    """
    positive("dimensions", dimensions)
    width = 0.0 if levels is None else math.log2(levels / 2)
    return width - log_likelihood / (dimensions * math.log(2))


def _signs(x: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """Probes `(b, probes, ...)`, drawn at once so that they do not depend on the batch size."""
    device = generator.device if generator is not None else x.device
    shape = (len(x), probes, *x.shape[1:])
    drawn = torch.randint(0, 2, shape, generator=generator, device=device)
    return (2 * drawn - 1).to(x)


def _along(
    velocity: Callable[..., Tensor],
    x: Tensor,
    grid: Sequence[float],
    solver: Any,
    vectors: Tensor | None,
    spread: Tensor,
) -> Tensor:
    """The log-densities of one batch."""
    shape, size = x.shape, x[0].numel()

    def moving(state: Tensor, t: Tensor) -> Tensor:
        at = partial(_with_time, velocity, t)
        slope, grows = _divergence(at, state[:, :-1].reshape(shape), vectors)
        return torch.cat([slope.reshape(len(state), -1), grows.unsqueeze(1)], 1)

    together = torch.cat([x.reshape(len(x), -1), x.new_zeros(len(x), 1)], 1)
    ended = integrate(moving, together, grid, solver)
    start, change = ended[:, :-1] / spread, ended[:, -1]
    constant = size * (spread.log() + 0.5 * math.log(2 * math.pi))
    return change - 0.5 * start.square().sum(1) - constant


def _with_time(velocity: Callable[..., Tensor], t: Tensor, x: Tensor) -> Tensor:
    return velocity(x, t)


def _divergence(
    function: Callable[[Tensor], Tensor], x: Tensor, vectors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The function at x and its divergence, exact or estimated with the given vectors."""
    # Reverse mode, since fused attention has no forward mode.
    output, pull = torch.func.vjp(function, x)
    if vectors is not None:
        pulled = torch.func.vmap(lambda vector: pull(vector)[0])(vectors)
        return output, (pulled * vectors).flatten(2).sum(2).mean(0)
    size, count = x[0].numel(), len(x)

    def entry(index: Tensor) -> Tensor:
        one = torch.nn.functional.one_hot(index, size).to(x).view(x.shape[1:]).expand_as(x)
        return (pull(one)[0] * one).flatten(1).sum(1)

    chunk = max(1, CHUNK // max(1, count * size))
    every = torch.arange(size, device=x.device)
    return output, torch.func.vmap(entry, chunk_size=chunk)(every).sum(0)
