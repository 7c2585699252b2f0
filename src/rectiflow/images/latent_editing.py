"""Editing in latent space: follow a flow back to its noise, change that, and come forward again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.fields import Field, evaluating
from rectiflow.flows.integration import Corrector, integrate, time_grid
from rectiflow.flows.sampling import condition_rows

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def encode(
    model: Field,
    images: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] = 50,
    solver: Any = "heun",
    batch_size: int = 1024,
    correctors: Sequence[Corrector] = (),
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """The noises from which a flow makes given images.

    The same field is followed from t = 1 to t = 0, without retraining. How exactly `decode` gets
    the images back depends on solver and steps; `flows.metrics.round_trip_error` measures it. A
    flow that maps noise to data well gives noises close to standard normal, unless the images are
    unlike its data.

    Args:
        model: the flow.
        images: images on the model's device.
        steps: number of equal steps, or a rising grid of times from 0 to 1.
        solver: an ODE solver.
        batch_size: images computed together.
        correctors: called after each step, see `integrate`.
        **condition: one row an image for tensors.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: torch.ones_like(x))
        >>> encode(model, torch.ones(1, 2), steps=4)
        tensor([[0., 0.]])

    Source: arXiv 2209.03003, section 2.1 (the flow reversed) and 5.3 (image editing).
    """
    grid = time_grid(steps)[::-1]
    found = _follow(model, images, grid, solver, batch_size, correctors, condition)
    return found / _scale(model, images)


@torch.no_grad()
def decode(
    model: Field,
    latents: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] = 50,
    solver: Any = "heun",
    batch_size: int = 1024,
    correctors: Sequence[Corrector] = (),
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """The images that a flow makes of noises: the way back from `encode`.

    Args:
        model: the flow.
        latents: noises on the model's device.
        steps: number of equal steps, or a rising grid of times from 0 to 1.
        solver: an ODE solver; that of `encode` for edits.
        batch_size: images computed together.
        correctors: called after each step, see `integrate`.
        **condition: one row an image for tensors.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: torch.ones_like(x))
        >>> decode(model, torch.zeros(1, 2), steps=4)
        tensor([[1., 1.]])
    """
    start = latents * _scale(model, latents)
    return _follow(model, start, time_grid(steps), solver, batch_size, correctors, condition)


def edit_latent(
    latents: Float[Tensor, "b *dims"],
    keep: float,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b *dims"]:
    """Move latents toward more typical noise: `keep z`, or `keep z + sqrt(1 - keep²) noise`.

    Encodings of unusual images lie outside the shell on which normal noise concentrates; shrinking
    them makes the decoded images more typical. With a generator fresh noise fills up the variance,
    so that normal latents stay normal and every call gives another variation.

    Args:
        latents: noises, as `encode` returns them.
        keep: share of the latent that is kept, in [0, 1]; 1 changes nothing.
        generator: draws the fresh noise; without one nothing is random.

    Raises:
        ValueError: `keep` outside [0, 1].

    Example:
        >>> edit_latent(torch.ones(1, 2), 0.5)
        tensor([[0.5000, 0.5000]])

    Source: arXiv 2209.03003, section 5.3 (image editing).
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in [0, 1], got {keep}")
    edited = keep * latents
    if generator is None:
        return edited
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    return edited + (1 - keep * keep) ** 0.5 * noise.to(latents)


def vary(
    model: Field,
    images: Float[Tensor, "b *dims"],
    *,
    keep: float = 0.8,
    generator: torch.Generator | None = None,
    steps: int | Sequence[float] = 50,
    solver: Any = "heun",
    batch_size: int = 1024,
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """Variations of images: encoded, moved toward typical noise, decoded.

    Args:
        model: the flow.
        images: images on the model's device.
        keep: share of the latent that is kept, in [0, 1]; 1 gives the images back.
        generator: for random variations; see `edit_latent`.
        steps: number of equal steps, or a rising grid of times from 0 to 1.
        solver: an ODE solver.
        batch_size: images computed together.
        **condition: one row an image for tensors.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: torch.ones_like(x))
        >>> vary(model, torch.full((1, 2), 3.0), keep=0.5, steps=4)
        tensor([[2., 2.]])

    Source: arXiv 2209.03003, section 5.3 (image editing).
    """
    options: dict[str, Any] = {"steps": steps, "solver": solver, "batch_size": batch_size}
    latents = encode(model, images, **options, **condition)
    edited = edit_latent(latents, keep, generator=generator)
    return decode(model, edited, **options, **condition)


def _scale(model: Field, x: Tensor) -> Tensor:
    """The standard deviation of the state at t = 0 for standard normal noise."""
    return model.path.start_scale(x)


def _follow(
    model: Field,
    x: Tensor,
    grid: Sequence[float],
    solver: Any,
    batch_size: int,
    correctors: Sequence[Corrector],
    condition: dict[str, Any],
) -> Tensor:
    positive("batch_size", batch_size)
    parts = []
    with evaluating(model):
        for begin in range(0, len(x), batch_size):
            part = slice(begin, begin + batch_size)
            rows = condition_rows(condition, part, len(x))
            parts.append(integrate(model, x[part], grid, solver, correctors=correctors, **rows))
    return torch.cat(parts) if parts else x.clone()
