"""Measurements of images: a degradation, then noise, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.images.degradations.linear import Degradation


def measure(
    degradation: Degradation,
    images: Float[Tensor, "b c h w"],
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b *measured"]:
    """What is observed of images: `y = A(x) + noise n`, with n standard normal and drawn once.

    The noise belongs to the measurement and never to the operator: inside a cost, fresh noise at
    every call would be another problem. Where nothing is measured (outside a mask) there is none.

    Args:
        degradation: the operator.
        images: in [-1, 1].
        noise: standard deviation, in units of the measurement.
        generator: draws the noise; the same one gives the same measurement.

    Raises:
        ValueError: a negative noise, or images that cannot be measured.

    Example:
        >>> from rectiflow.images.degradations import Identity
        >>> measure(Identity(), torch.ones(1, 1, 1, 1)).item()
        1.0
    """
    positive("noise", noise, zero=True)
    found = degradation.A(images)
    if not noise:
        return found
    device = generator.device if generator is not None else found.device
    drawn = torch.randn(found.shape, generator=generator, device=device, dtype=found.dtype)
    return found + noise * degradation.observed(drawn.to(found.device))
