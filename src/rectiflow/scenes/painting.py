"""Pictures optimised by score distillation, pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow.errors import NonFiniteLossError, positive
from rectiflow.optim.coordinate_clipping import clip_coordinates_
from rectiflow.optim.suppression import pixel_norms
from rectiflow.training import optimizers
from rectiflow.training.optimizers import OptimizerSettings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.scenes.score_distillation import ScoreDistillation

PAINTING = OptimizerSettings(
    name="adamw", learning_rate=0.01, schedule="cosine", warmup=100, clip_norm=0.0
)
"""The optimizer of the paper's two-dimensional experiments."""


@dataclass(frozen=True)
class Painted:
    """Pictures and how they came to be.

    Attributes:
        images: the pictures, in [-1, 1].
        looked: numbers of the steps that were looked at, from 0.
        before: the length of each pixel's gradient at these steps, before the clip.
        after: the same after it.
        clipped: share of the pixels that the clip shortened at these steps; 0 without one.
    """

    images: Float[Tensor, "b c h w"]
    looked: list[int]
    before: Float[Tensor, "n b h w"]
    after: Float[Tensor, "n b h w"]
    clipped: list[float]


def paint(
    distillation: ScoreDistillation,
    images: Float[Tensor, "b c h w"],
    *,
    steps: int = 1000,
    optim: OptimizerSettings = PAINTING,
    every: int = 10,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
    **condition: Any,
) -> Painted:
    """Optimise pictures so that a flow takes them for data.

    Each is a parameter of its own and stays in [-1, 1].

    Args:
        distillation: the loss.
        images: what to begin with, in [-1, 1].
        steps: steps of the optimizer.
        optim: the optimizer and its schedule.
        every: steps between looks at the gradients.
        generator: the source of randomness.
        progress: called with the number of finished steps.
        **condition: what the pictures should show, one row a picture for tensors.

    Returns:
        the pictures, and the gradients that were looked at.

    Raises:
        ValueError: numbers out of range, an optimizer that needs more than gradients.
        NonFiniteLossError: a gradient that is not finite.
    """
    positive("steps", steps)
    positive("every", every)
    if optim.name.startswith("sophia"):
        raise ValueError(f"{optim.name} needs a network's outputs to see curvature: take adamw")
    canvas = nn.Parameter(images.detach().clone())
    optimizer = optimizers.build([canvas], optim)
    looked, before, after, clipped = [], [], [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = optimizers.rate(optim, step, steps)
        optimizer.zero_grad(set_to_none=True)
        distillation(canvas, generator=generator, **condition).backward()
        if step % every == 0 or step == steps - 1:
            given, kept = (pixel_norms(g) for g in (distillation.unclipped, canvas.grad))
            if not bool(given.isfinite().all()):
                raise NonFiniteLossError(
                    f"the gradient at step {step} is not finite: the encoder's numbers overflow; "
                    "take float32"
                )
            looked.append(step)
            before.append(given.cpu())
            after.append(kept.cpu())
            seen = distillation.clip.last if distillation.clip is not None else None
            clipped.append(seen.fraction if seen is not None else 0.0)
        if optim.clip_coordinates:
            clip_coordinates_(canvas, optim.clip_coordinates)
        if optim.clip_norm:
            nn.utils.clip_grad_norm_([canvas], optim.clip_norm)
        optimizer.step()
        with torch.no_grad():
            canvas.clamp_(-1, 1)
        if progress is not None:
            progress(step + 1)
    return Painted(canvas.detach(), looked, torch.stack(before), torch.stack(after), clipped)
