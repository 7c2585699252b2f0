"""How many weights Sophia moves by its Newton-like step, and not by a clipped one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rectiflow.errors import positive
from rectiflow.training.figures import curves
from rectiflow.training.report import cell


@dataclass(frozen=True)
class WinRateReport:
    """The share of weights whose next step would not be clipped.

    Attributes:
        step: number of the step.
        win_rate: the share, in [0, 1].
    """

    step: int
    win_rate: float


class WinRate:
    """Reports Sophia's win rate during training: 0.1 to 0.5 is what `gamma` is tuned for.

    Args:
        every: steps between reports.

    Raises:
        ValueError: a number that is not positive; `observe`: an optimizer without a win rate.

    Example:
        >>> import torch
        >>> from rectiflow.optim import SophiaG
        >>> WinRate(every=5).observe(10, SophiaG([torch.nn.Parameter(torch.ones(2))]))
        WinRateReport(step=10, win_rate=0.0)

    Source: arXiv 2305.14342, section 2.3 and figure 9.
    """

    name: ClassVar[str] = "win-rate"

    def __init__(self, *, every: int = 100) -> None:
        positive("every", every)
        self.every = every

    def observe(self, step: int, optimizer: Any = None) -> WinRateReport | None:
        """Look at the optimizer after a training step; returns a report every so many steps."""
        if not callable(getattr(optimizer, "win_rate", None)):
            raise ValueError(
                f"{type(optimizer).__name__} has no win rate: this diagnosis is for SophiaG and "
                "SophiaH"
            )
        return None if step % self.every else WinRateReport(step, float(optimizer.win_rate()))

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plot the share over the steps; file to caption."""
        if not rows:
            return {}
        values = [row["win_rate"] for row in rows]
        drawn = curves(
            {"unclipped": ([row["step"] for row in rows], values)},
            folder / "win-rate.png",
            across="training step",
            up="share of weights not clipped",
        )
        inside = sum(0.1 <= value <= 0.5 for value in values)
        return {
            drawn: f"Sophia's win rate, from {cell(values[0])} to {cell(values[-1])}: within the "
            f"0.1 to 0.5 that the paper tunes gamma for in {inside} of {len(values)} reports."
        }
