"""Rectifiers that look at whole gradients: their norm, the mean of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.optim.parts import Part, Stretch, Whole, change_gradient

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClipNorm(Part):
    """Shortens the whole gradient to a norm, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        norm: largest norm of all gradients together.

    Raises:
        ValueError: a norm that is not positive.

    Source: arXiv 1211.5063, section 3.2.
    """

    norm: float = 1.0
    on = "gradient"
    surveys = True

    def __post_init__(self) -> None:
        positive("norm", self.norm)

    def survey(
        self, groups: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
    ) -> Iterable[dict[str, Tensor]]:
        every = [grad for _, grads in groups for grad in grads]
        if not every:
            return [{} for _ in groups]
        total = torch.nn.utils.get_total_norm(every)
        factor = (self.norm / (total + 1e-6)).clamp(max=1)
        return [{"norm_factor": factor} for _ in groups]

    def apply(self, stretch: Stretch) -> None:
        factor = stretch.numbers["norm_factor"].to(stretch.gradient)
        change_gradient(stretch, lambda gradient: gradient * factor)


@dataclass(frozen=True)
class CentreGradients(Part):
    """Subtracts from each row (output channel) of a gradient its mean.

    Tensors of fewer than two dimensions are left alone.

    Source: arXiv 2004.01461, equation 1.
    """

    on = "gradient"
    whole = True

    def apply(self, whole: Whole) -> None:
        def centred(gradient: Tensor) -> Tensor:
            made = gradient.clone()
            for index in whole.indices:
                view, (start, stop) = whole.bucket.views[index], whole.span(index)
                if view.ndim > 1 and stop > start:
                    # Rows of the first dimension lie in one piece each.
                    rows = made[start:stop].view(view.shape[0], -1)
                    rows.sub_(rows.mean(1, keepdim=True))
            return made

        change_gradient(whole, centred)
