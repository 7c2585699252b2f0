"""How a model answers to a feature alone, such as a picture of one colour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rectiflow.diagnose.looking import untouched

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureResponse:
    """What a model says to inputs that hold a feature and nothing else.

    Attributes:
        output: its answers, one row a feature.
        sensitivity: how fast each answer changes along its feature, per unit of input.
    """

    output: Tensor
    sensitivity: Tensor


def feature_response(
    model: Callable[[Tensor], Tensor], features: Float[Tensor, "b *dims"]
) -> FeatureResponse:
    """A model's answers to features alone, and its sensitivity to them.

    A spike at the edge of stability is a fall of the sensitivity to the feature that caused it.
    Follow this over a training for a feature that opposing groups share.

    Args:
        model: the model; a module is looked at in evaluation mode.
        features: synthetic inputs, none of them zero.

    Raises:
        ValueError: a feature of zeros.

    Example:
        >>> found = feature_response(lambda x: 3 * x, torch.tensor([[0.0, 2.0]]))
        >>> found.output, found.sensitivity
        (tensor([[0., 6.]]), tensor([3.]))

    Source: arXiv 2311.04163, section 2; the measure is ours.
    """
    lengths = features.flatten(1).norm(dim=1)
    if not bool((lengths > 0).all()):
        raise ValueError("a feature of zeros has no direction: give inputs that hold something")
    units = features / lengths.view(-1, *(1,) * (features.ndim - 1))
    with untouched(model if isinstance(model, nn.Module) else None):
        output, slope = torch.autograd.functional.jvp(model, features.detach(), units)
    return FeatureResponse(output.detach(), slope.detach().flatten(1).norm(dim=1))
