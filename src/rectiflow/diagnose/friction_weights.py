"""What diffGrad's friction does: how gradients change, how that weighs steps, where they turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.errors import positive
from rectiflow.optim.friction import Friction
from rectiflow.training.figures import curves
from rectiflow.training.report import cell

if TYPE_CHECKING:
    from torch import Tensor

BINS = 20
"""Bins of each histogram."""
DECADES = (-8, 2)
"""Powers of ten between which changes are counted; those outside count in the outer bins."""


@dataclass(frozen=True)
class FrictionReport:
    """The friction of one step over all weights.

    Attributes:
        step: number of the step.
        mean: mean weight of a direction.
        weights: shares of the weights of directions in `BINS` equal bins over what they can be.
        changes: shares of the gradients' absolute changes in `BINS` bins of equal ratio.
        cosine: cosine between Adam's mean of gradients and the same under friction; 1 where
            friction is but a factor.
    """

    step: int
    mean: float
    weights: list[float]
    changes: list[float]
    cosine: float


class FrictionWeights:
    """Reports what friction does to the steps of `DiffGrad`, or of any chain with `Friction`.

    Where the mean weight is 1/2 and the cosine 1, Adam at half the rate does the same.

    Args:
        every: steps between reports.

    Raises:
        ValueError: a number that is not positive; `observe`: an optimizer without friction, or
            with one relative to Adam's mean of squares.

    Source: arXiv 1909.11015, equation 5.
    """

    name: ClassVar[str] = "friction"

    def __init__(self, *, every: int = 100) -> None:
        positive("every", every)
        self.every = every
        self._before: list[Tensor] = []

    @torch.no_grad()
    def observe(self, step: int, optimizer: Any = None) -> FrictionReport | None:
        """Look at the optimizer after a training step; returns a report every so many steps."""
        found = [part for part in getattr(optimizer, "parts", ()) if isinstance(part, Friction)]
        if not found or found[0].relative:
            raise ValueError(
                f"{type(optimizer).__name__} has no friction by absolute changes: this diagnosis "
                "is for diffgrad"
            )
        report = None
        if step % self.every == 0 and self._before:
            report = self._report(step, optimizer, found[0])
        self._before = []
        if (step + 1) % self.every == 0:
            self._before = [one["previous_grad"].clone() for one in _states(optimizer)]
        return report

    def _report(self, step: int, optimizer: Any, friction: Friction) -> FrictionReport | None:
        states = _states(optimizer)
        if len(states) != len(self._before):
            return None
        change = torch.cat(
            [(a - one["previous_grad"]).flatten() for a, one in zip(self._before, states)]
        )
        size = change.abs().clamp(10.0 ** DECADES[0], 10.0 ** DECADES[1]).log10()
        weight = friction.weigh(change)
        low, high = sorted((friction.offset, friction.offset + friction.scale))
        mean = torch.cat([one.get("exp_avg", one["previous_grad"]).flatten() for one in states])
        cosine = torch.cosine_similarity(mean, mean * weight, dim=0)
        return FrictionReport(
            step,
            float(weight.mean()),
            _shares(weight, low, high),
            _shares(size, *DECADES),
            float(cosine),
        )

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plot weight and cosine over the steps, and the last changes; file to caption."""
        if not rows:
            return {}
        steps, last = [row["step"] for row in rows], rows[-1]
        drawn = curves(
            {
                "mean weight": (steps, [row["mean"] for row in rows]),
                "cosine": (steps, [row["cosine"] for row in rows]),
            },
            folder / "friction.png",
            across="training step",
            up="friction",
        )
        width = (DECADES[1] - DECADES[0]) / BINS
        sizes = [10 ** (DECADES[0] + width * (index + 0.5)) for index in range(BINS)]
        changes = curves(
            {f"step {row['step']}": (sizes, row["changes"]) for row in (rows[0], last)},
            folder / "friction-changes.png",
            across="absolute change of a gradient",
            up="share of the weights",
            logarithmic="x",
        )
        same = abs(last["mean"] - 0.5) < 0.005 and last["cosine"] > 0.999
        verdict = (
            "Adam at half the rate does the same"
            if same
            else "friction is more than a factor here: compare with Adam at half the rate"
        )
        return {
            drawn: f"Friction at step {last['step']}: mean weight {cell(last['mean'])}, cosine "
            f"between the mean of gradients without and with it {cell(last['cosine'])}: {verdict}.",
            changes: "How much gradients change from one step to the next. Friction leaves 1/2 "
            "where changes are far below 1.",
        }


def _states(optimizer: Any) -> list[dict[str, Any]]:
    """The state of every weight that has taken a step."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return [s for s in (optimizer.state.get(p, {}) for p in weights) if float(s.get("step", 0))]


def _shares(values: Tensor, low: float, high: float) -> list[float]:
    """Shares of values in equal bins."""
    counts = torch.histc(values.float(), BINS, low, high)
    return (counts / max(values.numel(), 1)).tolist()
