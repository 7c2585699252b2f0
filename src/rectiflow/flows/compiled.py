"""Several solver steps in one compiled call, for networks that cost more to launch than to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.fields import Field, Velocity, velocity_of
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.integration import check_inputs, stage_times, time_grid
from rectiflow.flows.solvers import RungeKutta, resolve

if TYPE_CHECKING:
    from jaxtyping import Float


class CompiledSampler:
    """`integrate` with `steps_per_call` steps unrolled into one `torch.compile`d function.

    Compiling a single call of a small network makes it slower on a CPU; compiling several steps
    together makes the loop faster. The grid enters as tensors, so other grids, numbers of steps
    and directions need no new compilation; a number of steps that `steps_per_call` does not
    divide ends with smaller calls.

    Args:
        field: a field or velocity function.
        solver: a fixed-step Runge-Kutta solver by name or object.
        steps_per_call: steps in one compiled call.
        mode: passed to `torch.compile`, such as "reduce-overhead" for CUDA graphs.

    Raises:
        ValueError: the solver is adaptive or stochastic, or the field remembers evaluations.
    """

    def __init__(
        self,
        field: Field | Velocity,
        solver: str | RungeKutta = "euler",
        *,
        steps_per_call: int = 10,
        mode: str | None = None,
    ) -> None:
        positive("steps_per_call", steps_per_call)
        method = resolve(solver)
        if not isinstance(method, RungeKutta):
            raise ValueError(f"only fixed-step Runge-Kutta solvers can be unrolled, got {solver!r}")
        refuse_memory(field, "steps that are compiled together share no memory")
        method = method.bind(field)
        self.field, self.solver, self.steps_per_call = field, method, steps_per_call
        velocity = velocity_of(field)

        def several(
            x: Tensor, times: Tensor, lengths: Tensor, condition: dict[str, Tensor]
        ) -> Tensor:
            def at(state: Tensor, t: Tensor) -> Tensor:
                return velocity(state, t, **condition)

            for i in range(times.shape[0]):
                x, _ = method.step(at, x, times[i].unbind(0), lengths[i], None)
            return x

        self._several: Callable[..., Tensor] = torch.compile(
            several, mode=mode, dynamic=False, fullgraph=True
        )

    def __call__(
        self,
        x: Float[Tensor, "b *dims"],
        times: int | Sequence[float] = 50,
        **condition: Any,
    ) -> Float[Tensor, "b *dims"]:
        """Follow the field over `times`; see `integrate`."""
        grid = time_grid(times)
        check_inputs(self.field, x, condition)
        lengths = self.solver.intervals(grid)
        stages = torch.stack(
            [torch.stack(row) for row in stage_times(x, grid, lengths, self.solver.nodes)]
        )
        spans = torch.tensor(lengths, dtype=stages.dtype, device=x.device)
        for part, span in zip(stages.split(self.steps_per_call), spans.split(self.steps_per_call)):
            x = self._several(x, part, span, condition)
        return x
