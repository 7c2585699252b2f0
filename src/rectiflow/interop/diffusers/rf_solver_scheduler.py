"""A scheduler that makes stock flow pipelines take the second-order steps of RF-Solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput as Output,
)

from rectiflow.flows.solvers import RFSolver

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class RFSolverScheduler(FlowMatchEulerDiscreteScheduler):
    """Two network calls a step and order 2, in any pipeline of diffusers that follows a flow.

    `flows.RFSolver` as a scheduler: of N steps the pipeline sees 2N timesteps, those of the grid
    (shifts included) and between them the trial moves. At equal calls compare N of these with 2N
    of Euler's. Where rectiflow samples, `integrate(..., "rf-solver")` is the shorter way.

    Args:
        **config: the configuration of `FlowMatchEulerDiscreteScheduler`; `of` takes over that of
            another flow scheduler and sets theta.

    Example:
        >>> scheduler = RFSolverScheduler.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
        >>> scheduler.set_timesteps(2)
        >>> len(scheduler.timesteps), scheduler.theta
        (4, 0.5)

    Source: arXiv 2411.04746, section 3.2.
    """

    order = 2
    sigmas: Tensor

    @classmethod
    def of(cls, scheduler: Any, *, theta: float = 0.5) -> RFSolverScheduler:
        """The scheduler with the grid of another one, such as `pipe.scheduler`.

        Args:
            scheduler: a flow scheduler of diffusers.
            theta: where in the step the second velocity is taken, in (0, 1].

        Raises:
            ValueError: theta outside (0, 1], or a scheduler that follows no flow.
        """
        RFSolver(theta)
        if not type(scheduler).__name__.startswith("FlowMatch") and not isinstance(scheduler, cls):
            raise ValueError(
                f"RF-Solver steps along a flow, and {type(scheduler).__name__} does not: take a "
                "pipeline with a FlowMatch scheduler"
            )
        made = cls.from_config(scheduler.config)
        made.register_to_config(theta=theta)
        return made

    @property
    def theta(self) -> float:
        """Where in the step the second velocity is taken."""
        return self.config.get("theta", 0.5)

    # Pipelines read the names of these arguments to see what grids a scheduler takes.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """The grid of `FlowMatchEulerDiscreteScheduler` with the trial moves in between.

        Args:
            num_inference_steps: number of steps, of two calls each.
            device: where the times are kept.
            sigmas: noise levels of the grid, without the last.
            mu: exponent of the shift by resolution.
            timesteps: the same as timesteps.
        """
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        grid = self.sigmas
        trial = torch.lerp(grid[:-1], grid[1:], self.theta)
        self.sigmas = torch.cat([torch.stack([grid[:-1], trial], 1).flatten(), grid[-1:]])
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._first: tuple[Tensor, Tensor] | None = None

    def step(
        self,
        model_output: Float[Tensor, "b *dims"],
        timestep: Any,
        sample: Float[Tensor, "b *dims"],
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """The trial state after the first call of a step, the step itself after the second.

        Raises:
            ValueError: a second call without the first, as when sampling starts at a trial move.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        # Half precision would lose small steps.
        x, velocity = sample.float(), model_output.float()
        if index % 2 == 0:
            self._first = x, velocity
            found = x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity
        else:
            if self._first is None:
                raise ValueError(
                    f"timestep {float(timestep):g} is the second of a step: begin at one of "
                    "timesteps[::2]"
                )
            x, first = self._first
            length = self.sigmas[index + 1] - self.sigmas[index - 1]
            found = x + length * torch.lerp(first, velocity, 1 / (2 * self.theta))
            self._first = None
        self._step_index = index + 1
        found = found.to(sample.dtype)
        return Output(prev_sample=found) if return_dict else (found,)
