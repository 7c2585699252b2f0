"""The root of the mean squared difference as a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.flows.premetrics import Regression

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class RootMeanSquare:
    """`|d| / sqrt(n)` over the n dimensions of a sample's difference d.

    Linear at every size, so that hard samples weigh no more than easy ones; `PseudoHuber` is its
    smooth form. For pairs made by a flow: on independent pairs its optimum is not the mean
    velocity.

    Source: arXiv 2405.20320, section 4.2 (the "l2" of its code; "l2-squared" is `L2`).
    """

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        flat = regression.difference.flatten(1)
        # The norm's gradient is 0 at 0, where that of a root would be NaN.
        return torch.linalg.vector_norm(flat, dim=1) / flat.shape[1] ** 0.5
