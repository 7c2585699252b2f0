"""The few coordinates that carry most of a gradient, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.optim.coordinate_clipping import top_threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeavyCoordinates:
    """The largest coordinates of a gradient.

    Attributes:
        threshold: they are larger than this.
        energy: their part of the squared length of the whole gradient.
        shares: the part of each tensor that they make up.
    """

    threshold: float
    energy: float
    shares: dict[str, float]


@torch.no_grad()
def heavy_coordinates(gradients: Mapping[str, Tensor], fraction: float = 0.1) -> HeavyCoordinates:
    """What clipping a fraction of all coordinates would touch.

    In transformers these are, for the most part, gains, biases and embeddings.

    Args:
        gradients: name to gradient.
        fraction: the part of all coordinates, in [0, 1).

    Raises:
        ValueError: a fraction outside [0, 1), or no numbers.

    Example:
        >>> found = heavy_coordinates({"a": torch.tensor([3.0, 1.0]), "b": torch.ones(2)}, 0.25)
        >>> found.energy, found.shares
        (0.75, {'a': 0.5, 'b': 0.0})

    Source: arXiv 2306.00204, section 4.
    """
    threshold = top_threshold(list(gradients.values()), fraction)
    whole = heavy = 0.0
    shares = {}
    for name, gradient in gradients.items():
        size = gradient.abs().double()
        above = size > threshold
        whole += float(size.square().sum())
        heavy += float(size[above].square().sum())
        shares[name] = float(above.double().mean()) if above.numel() else 0.0
    return HeavyCoordinates(float(threshold), heavy / whole if whole else 0.0, shares)
