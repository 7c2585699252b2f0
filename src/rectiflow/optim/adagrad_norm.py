"""AdaGrad with one number for all weights: the norm of every gradient so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.optim.parts import Direction, Stretch
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from torch import Tensor

SUM = "sum_of_squares"


@dataclass(frozen=True)
class AdagradNorm(Direction):
    """`g / b` with `b² = b0² + ||g_1||² + ... + ||g_t||²`, norms over the weights of a group.

    Coupled weight decay is part of g in both. Unlike the diagonal form it commutes with rotations
    of the weights.

    Args:
        initial: b0², > 0.
        eps: added to b.

    Raises:
        ValueError: an initial sum that is not positive, a negative eps.

    Source: arXiv 2402.11215, section 2 (AdaGrad-Norm). The official code keeps a sum a row.
    """

    initial: float = 1e-2
    eps: float = 1e-10
    surveys = True

    @property
    def defaults(self) -> dict[str, Any]:
        return {"eps": self.eps, SUM: self.initial}

    def check(self, group: Mapping[str, Any]) -> None:
        positive("eps", group["eps"], zero=True)
        positive("initial", float(group[SUM]))

    def survey(
        self, groups: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
    ) -> Iterable[dict[str, Tensor]]:
        found = []
        for group, grads in groups:
            total = torch.nn.utils.get_total_norm([wide(grad) for grad in grads])
            # A new tensor each time: what state_dict gave away stays as it was.
            group[SUM] = group[SUM] + total.square()  # type: ignore[index]
            found.append({"norm_so_far": torch.as_tensor(group[SUM]).sqrt()})
        return found

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        return {"eps": float(group["eps"])}

    def apply(self, stretch: Stretch) -> None:
        total = stretch.numbers["norm_so_far"].to(stretch.gradient)
        stretch.direction = stretch.momentum_gradient / (total + stretch.numbers["eps"])
