"""Heun's method with a last step of Euler's: one evaluation less, none at t = 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rectiflow.flows.guided import refuse_turns
from rectiflow.flows.solvers import EULER, HEUN

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class HeunEuler:
    """Heun's steps, but Euler's for the step that ends at t = 1: 2N - 1 evaluations for N steps.

    Use it for diffusion models, whose field is undefined or badly trained at the data end. The
    error stays of second order, since a single Euler step errs by its length squared. Away from
    t = 1 (encoding, or a grid that stops before) it is Heun's method.

    Example:
        >>> import torch
        >>> from rectiflow.flows import Counted, integrate
        >>> field = Counted(lambda x, t: -x)
        >>> _ = integrate(field, torch.ones(1, 1), 10, HeunEuler())
        >>> field.evaluations
        19

    Source: arXiv 2206.00364, algorithm 1; the loop of arXiv 2407.12718's code adds an empty step.
    """

    nodes: ClassVar[tuple[float, ...]] = HEUN.nodes
    order: ClassVar[int] = HEUN.order
    _left: int = field(default=0, init=False, repr=False, compare=False)
    _to_data: bool = field(default=False, init=False, repr=False, compare=False)

    def bind(self, field: Any) -> HeunEuler:
        refuse_turns(field)
        # Every integration counts its own steps.
        return HeunEuler()

    def intervals(self, times: Sequence[float]) -> list[float]:
        self._left, self._to_data = len(times) - 1, times[-1] == 1
        return HEUN.intervals(times)

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._left -= 1
        rule = EULER if self._to_data and not self._left else HEUN
        return rule.step(velocity, x, times, dt, generator)
