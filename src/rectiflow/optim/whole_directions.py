"""Rectifiers of directions that keep less of them: unit tensors, signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rectiflow.optim.parts import Part, Stretch, Whole


@dataclass(frozen=True)
class UnitTensors(Part):
    """Scales the direction of each tensor to a root mean square of one: normalised descent.

    A direction of zeros stays as it is.

    Source: arXiv 2306.00204, the normalised SGD of its experiments.
    """

    whole = True

    def apply(self, whole: Whole) -> None:
        made = whole.direction.clone()
        for start, stop in map(whole.span, whole.indices):
            part = made[start:stop]
            length = torch.linalg.vector_norm(part)
            part.mul_(torch.where(length > 0, (stop - start) ** 0.5 / length, length))
        whole.direction = made


@dataclass(frozen=True)
class Sign(Part):
    """The sign of a direction.

    Source: arXiv 1802.04434, signSGD and Signum behind `Momentum`.
    """

    def apply(self, stretch: Stretch) -> None:
        stretch.direction = stretch.direction.sign()
