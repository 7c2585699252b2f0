"""Time and class labels as vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow import errors

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Times in [0, 1] are stretched to the 1000 steps that the frequencies below were made for.
TIME_SCALE = 1000.0
MAX_PERIOD = 10000.0


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time at geometrically spaced frequencies.

    With n = width / 2 and f_k = 10000^(-k / (n - 1)), the features are sin(1000 t f_k) for
    k = 0 ... n - 1, then cos(1000 t f_k). The table of frequencies is no part of the state
    dict and stays in at least float32 whatever the module is cast to: rounded to bfloat16 it
    would shift the fastest phases by radians.

    Args:
        width: number of features, even and at least 4.

    Example:
        >>> TimeEmbedding(4)(torch.tensor([0.0]))
        tensor([[0., 0., 1., 1.]])

    Source:
        the positional encoding of Vaswani et al. 2017 as used by Ho et al. 2020, DDPM.
    """

    rates: Tensor
    shifts: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"the number of time features must be even and >= 4, got {width}")
        self.width = width
        self.register_buffer("rates", torch.empty(0), persistent=False)
        self.register_buffer("shifts", torch.empty(0), persistent=False)
        self._fill()

    def forward(self, t: Float[Tensor, "batch"]) -> Float[Tensor, "batch features"]:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        # cos(a) = sin(a + pi / 2): two kernels instead of four.
        return torch.addcmul(self.shifts, wide[:, None], self.rates).sin().to(t.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow moves and casts, then refill: covers `to_empty` and half precision too."""
        super()._apply(fn, recurse)
        self._fill()
        return self

    def _fill(self) -> None:
        like = self.rates
        dtype = torch.promote_types(like.dtype, torch.float32)
        half = self.width // 2
        # In float64 on the CPU: not every accelerator has it.
        k = torch.arange(half, device="cpu", dtype=torch.float64)
        rates = TIME_SCALE * torch.exp(-math.log(MAX_PERIOD) / (half - 1) * k)
        shifts = torch.cat([torch.zeros_like(k), torch.full_like(k, math.pi / 2)])
        self.rates = torch.cat([rates, rates]).to(dtype).to(like.device)
        self.shifts = shifts.to(dtype).to(like.device)


class LabelEmbedding(nn.Module):
    """One learned vector per class and one for "no class", the null index `classes`.

    Args:
        classes: number of classes.
        width: length of the vectors.

    Example:
        >>> embed = LabelEmbedding(10, 8)
        >>> torch.equal(embed(None), embed(torch.tensor([10]))[0])
        True
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        errors.positive("classes", classes)
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, label: Int[Tensor, "batch"] | None) -> Float[Tensor, "*batch width"]:
        """The vectors of the labels; without labels the null vector, for broadcasting."""
        return self.table.weight[-1] if label is None else self.table(label)
