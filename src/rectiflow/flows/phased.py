"""Pairs for a flow in phases, made while training and never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.flows.couplings import Data, Draw, Independent, Pairs
from rectiflow.flows.fields import FlowModel, evaluating, velocity_of
from rectiflow.flows.first_order import ends_through, first_order_jump
from rectiflow.flows.guided import begun
from rectiflow.flows.integration import time_grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PhasedDraw(Pairs):
    """Pairs whose paths are the flow of a teacher between two times, one phase a row.

    Attributes:
        begin: the time at which each row's phase begins (its noisy end).
        end: the time at which it ends.
    """

    begin: Tensor
    end: Tensor


@dataclass(frozen=True)
class PhasedPairs:
    """Real data, noised to the start of a phase and carried to its end by a teacher.

    The way from noise to data is cut into phases of equally many teacher steps. A row takes a
    sample of the data, a phase at random and a noise, and follows the teacher through that phase
    alone. The pair returned is the one whose path goes through both ends of the phase:
    interpolating it at times of the phase gives the exact first-order line, and its source differs
    from the noise that was drawn. No pairs are stored, and rows in different phases are computed
    together. The model that learns from it needs one step a phase.

    Args:
        teacher: the model to follow; never trained here.
        data: samples with their conditions.
        phases: number of phases, which is the least number of steps at inference.
        steps: the teacher's steps over all phases, or its grid of times from 0 on; a multiple of
            `phases` many. On a discrete path, `path.trailing(40, clean=False)` ends at index 0.
        guided: a field around the teacher (guidance) to follow instead of the teacher itself.

    Raises:
        ValueError: more phases than steps, steps that phases do not divide, or a grid that does
            not rise from 0.

    Example:
        >>> teacher = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
        >>> pairs = PhasedPairs(teacher, torch.zeros(8, 2), phases=2, steps=4)
        >>> pairs.boundaries, pairs.draw(Draw.of(3)).source.shape
        ([0.0, 0.5, 1.0], torch.Size([3, 2]))

    Source: arXiv 2410.07303, section 3.4 (phased ODE segmentation); 40 steps in 4 phases as in the
        official code.
    """

    teacher: FlowModel
    data: Data | Tensor
    phases: int = 4
    steps: int | Sequence[float] = 40
    guided: Any = None

    def __post_init__(self) -> None:
        positive("phases", self.phases)
        grid = time_grid(self.steps)
        count = len(grid) - 1
        if grid[0] != 0:
            raise ValueError(
                f"the teacher's times must rise from 0, got {grid[0]:g} to {grid[-1]:g}"
            )
        if self.phases > count:
            raise ValueError(
                f"{self.phases} phases need as many teacher steps at least, got {count}: take "
                "more steps or fewer phases"
            )
        if count % self.phases:
            raise ValueError(
                f"{count} teacher steps cannot be cut into {self.phases} equal phases: take a "
                "multiple"
            )

    @property
    def boundaries(self) -> list[float]:
        """The times at which phases begin and end, 0 first."""
        grid = time_grid(self.steps)
        return grid[:: (len(grid) - 1) // self.phases]

    def draw(self, draw: Draw) -> PhasedDraw:
        pairs = Independent(self.data).draw(draw)
        x, path = pairs.target, self.teacher.path
        grid = torch.tensor(
            time_grid(self.steps),
            device=x.device,
            dtype=torch.promote_types(x.dtype, torch.float32),
        )
        each = (len(grid) - 1) // self.phases
        phase = (draw.uniform() * self.phases).long().clamp(max=self.phases - 1)
        first = (phase * each).to(x.device)
        begin, end = grid[first], grid[first + each]
        start = x = path.interpolate(pairs.source, x, begin).to(x.dtype)
        velocity = velocity_of(begun(self.guided if self.guided is not None else self.teacher))
        with torch.no_grad(), evaluating(self.teacher, start.device):
            for step in range(each):
                t, s = grid[first + step], grid[first + step + 1]
                x = first_order_jump(path, velocity(x, t, **pairs.condition), x, t, s)
        source, target = ends_through(path, start, begin, x, end)
        return PhasedDraw(source, target, pairs.condition, begin=begin, end=end)
