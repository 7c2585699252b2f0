"""Radial projection: a step without the part that only makes scale-invariant weights longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive, unknown
from rectiflow.optim.directions import Momentum
from rectiflow.optim.parts import Part, Whole

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("auto", "off", "force")


@dataclass(frozen=True)
class RadialProjection(Part):
    """Takes the radial part out of the direction of weights whose scale does not matter.

    Weights in front of a normalisation change nothing by their length, so their gradient is
    orthogonal to them; momentum is not, and makes them grow and the effective step shrink. A
    tensor of two or more dimensions is taken for scale-invariant if its gradient is almost
    orthogonal to it: `max |cos| < delta / sqrt(dim)`, over the rows of the first dimension
    (channels), or else over the tensor as one vector. The direction then loses its part along the
    weight, row by row or as a whole, and weight decay is `wd_ratio` of the usual.

    Each tensor is decided on its device: one on a GPU is not waited for. Groups may say
    `projection="off"` or `"force"` (the test by channels passes), and `channel_dim` for layers
    whose output channels are not the first dimension (transposed convolutions: 1).

    Args:
        delta: how orthogonal a gradient must be.
        wd_ratio: share of weight decay that projected weights get.
        eps: added to the norms of weights.
        project_buffer: project the momentum buffer as well, as the official SGDP without nesterov
            does by sharing it with the direction; the paper does not.

    Raises:
        ValueError: negative numbers, an unknown `projection`, `project_buffer` where the direction
            is not the buffer of `Momentum`.

    Source: arXiv 2006.08217, algorithms 1 and 2, and the official code's order of views.
    """

    delta: float = 0.1
    wd_ratio: float = 0.1
    eps: float = 1e-8
    project_buffer: bool = False
    whole = True

    @property
    def defaults(self) -> dict[str, Any]:
        return {
            "delta": self.delta,
            "wd_ratio": self.wd_ratio,
            "projection": "auto",
            "channel_dim": 0,
        }

    def check(self, group: Mapping[str, Any]) -> None:
        positive("delta", group["delta"], zero=True)
        positive("wd_ratio", group["wd_ratio"], zero=True)
        if group["projection"] not in MODES:
            raise unknown("projection", group["projection"], MODES)

    def check_chain(self, parts: Sequence[Part]) -> None:
        rules = [part for part in parts if isinstance(part, Momentum)]
        if self.project_buffer and not any(rule.momentum and not rule.nesterov for rule in rules):
            raise ValueError(
                "project_buffer projects the buffer of Momentum without nesterov: leave it out "
                "with other rules"
            )

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, Any]:
        below = {"auto": float(group["delta"]), "off": 0.0, "force": float("inf")}
        return {
            "projected_below": below[group["projection"]],
            "projected_decay": float(group["wd_ratio"]),
            "channels": group["channel_dim"],
        }

    def apply(self, whole: Whole) -> None:
        number, bucket = whole.numbers, whole.bucket
        shares: list[Tensor | None] = []
        for index in whole.indices:
            view, (start, stop) = bucket.views[index], whole.span(index)
            if view.ndim < 2 or stop == start or not number["projected_below"]:
                shares.append(None)
                continue
            weight, gradient, travel = (
                _like(view, flat, start) for flat in (whole.param, whole.raw, whole.direction)
            )
            channel = number["channels"] % view.ndim
            rows = [_rows(part, channel) for part in (weight, gradient, travel)]
            found = self._radial(rows[0], rows[1], rows[2], number)
            if found is None:
                shares.append(None)
                continue
            amount, share = found
            shape = [1] * view.ndim
            shape[channel] = -1
            travel.addcmul_(weight, amount.view(shape), value=-1)
            if self.project_buffer:
                _like(view, whole.state["momentum_buffer"], start).copy_(travel)
            shares.append(share)
        self._decay(whole, shares)

    def _radial(
        self, weight: Tensor, gradient: Tensor, travel: Tensor, number: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """How much of each row of the weight the direction loses; the share of weight decay.

        All three are given as rows, one a channel. On a CPU None where it loses nothing; a GPU
        would have to be waited for to know.
        """
        lengths = torch.linalg.vector_norm(weight, dim=1)
        slopes = torch.linalg.vector_norm(gradient, dim=1)
        inner = torch.linalg.vecdot(weight, gradient)
        below = number["projected_below"]
        by_row = _cosine(inner, lengths, slopes, self.eps).max() < below / weight.shape[1] ** 0.5
        length, slope = torch.linalg.vector_norm(lengths), torch.linalg.vector_norm(slopes)
        at_once = _cosine(inner.sum(), length, slope, self.eps) < below / weight.numel() ** 0.5
        if weight.device.type == "cpu" and not (by_row or at_once):
            return None
        along = torch.linalg.vecdot(weight, travel)
        rows = along / (lengths + self.eps).square()
        whole = (along.sum() / (length + self.eps).square()).expand_as(rows)
        amount = torch.where(by_row, rows, torch.where(at_once, whole, torch.zeros_like(rows)))
        share = torch.full_like(amount[0], number["projected_decay"])
        return amount, torch.where(by_row | at_once, share, torch.ones_like(share))

    def _decay(self, whole: Whole, shares: list[Tensor | None]) -> None:
        """Weight decay by tensor, in place of that of the chain."""
        number = whole.numbers
        decay, number["decay"] = number["decay"], 0.0
        if not decay:
            return
        for index, share in zip(whole.indices, shares):
            start, stop = whole.span(index)
            whole.param[start:stop].mul_(1 - decay * (1.0 if share is None else share))


def _cosine(inner: Tensor, first: Tensor, second: Tensor, eps: float) -> Tensor:
    """`|cos|` from an inner product and two norms, each at least eps."""
    return inner.abs() / (first.clamp(min=eps) * second.clamp(min=eps))


def _like(view: Tensor, flat: Tensor, start: int) -> Tensor:
    """The stretch of a flat buffer that belongs to a weight, shaped like it."""
    return flat.as_strided(view.shape, view.stride(), flat.storage_offset() + start)


def _rows(tensor: Tensor, channel: int) -> Tensor:
    """A tensor as rows, one a channel; the order within a row is any, but always the same."""
    strides = tensor.stride()
    if channel == 0 and strides[0] == max(strides):
        # The first dimension is outermost, so that rows are in one piece each.
        length = tensor.numel() // tensor.shape[0]
        return tensor.as_strided((tensor.shape[0], length), (strides[0], 1))
    return tensor.movedim(channel, 0).flatten(1)
