"""Consistency distillation: the second stage after rectified diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow.distill.rectified_diffusion import check_start
from rectiflow.distill.reflow import student_of
from rectiflow.errors import positive, unknown
from rectiflow.flows.couplings import Coupling, Draw
from rectiflow.flows.data_premetrics import DataPseudoHuber
from rectiflow.flows.fields import FlowModel, evaluating, velocity_of
from rectiflow.flows.first_order import first_order_jump
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.integration import time_grid
from rectiflow.flows.paths import expand
from rectiflow.flows.premetrics import Premetric, Regression
from rectiflow.training.method import Phase

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BOUNDARIES = ("first-order", "skip")


class ConsistencyDistillation:
    """Teach a model to name the same data from every time of a trajectory of its teacher.

    A pair is noised to a time of the grid, and the teacher takes one first-order step toward the
    data. The student's estimate at the first state is drawn to that of a slowly moving copy of
    itself at the second; at the data end the estimate is the state itself, and from there the
    answer spreads to the noise. A rectified teacher is nearly of first order, so its targets
    hardly change along the way and training is short. Sample the student in one first-order step.

    Args:
        teacher: the model whose steps are taken and whose weights training starts from, best one
            trained by `RectifiedDiffusion`.
        coupling: what is noised: `Independent(data)` for real data with fresh noises, or pairs.
        steps: the teacher's number of steps, or its rising grid of times from 0 to 1.
        guided: a field around the teacher (guidance) to follow instead of the teacher itself.
        boundary: how the estimate meets the state at the data end: "first-order" takes the
            model's data estimate, which does so by itself for velocity, noise, score and v; "skip"
            mixes `c_skip x + c_out D`, for any prediction.
        width: for "skip", the NSR at which state and estimate weigh alike.
        premetric: how far two estimates are apart; element-wise pseudo-Huber by default.
        decay: of the moving copy, a step.

    Raises:
        ValueError: "first-order" with a data prediction, a noise or score prediction on a path
            that starts from pure noise, a grid that does not rise from 0 to 1, guidance with
            momentum, an unknown boundary, or a decay outside [0, 1).

    Source: arXiv 2410.07303, section 3.4 (second stage; no code was released); arXiv 2303.01469,
        algorithm 2; decay of arXiv 2310.04378.
    """

    def __init__(
        self,
        teacher: FlowModel,
        coupling: Coupling,
        *,
        steps: int | Sequence[float] = 50,
        guided: Any = None,
        boundary: str = "first-order",
        width: float = 0.05,
        premetric: Premetric | None = None,
        decay: float = 0.95,
    ) -> None:
        check_start(teacher)
        positive("width", width)
        if boundary not in BOUNDARIES:
            raise unknown("boundary", boundary, BOUNDARIES)
        if boundary == "first-order" and teacher.prediction == "data":
            raise ValueError(
                "a data prediction is not tied to the state at the data end, and a constant would "
                "fit: use boundary='skip'"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self._grid = time_grid(steps)
        if (self._grid[0], self._grid[-1]) != (0.0, 1.0):
            raise ValueError(
                "times must rise from 0 (noise), where the student's one step starts, to 1 (data), "
                f"got {self._grid[0]:g} to {self._grid[-1]:g}"
            )
        refuse_memory(guided, "the teacher takes single steps at times drawn anew")
        self.teacher, self.coupling = teacher, coupling
        self.followed = guided if guided is not None else teacher
        self.boundary, self.width, self.decay = boundary, width, decay
        self.premetric: Premetric = premetric if premetric is not None else DataPseudoHuber()
        student = student_of(teacher)
        student.sampling = {"solver": "first-order", "steps": 1, "made_for": 1}
        self._networks = _Networks(student)
        self._seen = 0

    @property
    def model(self) -> FlowModel:
        """The student."""
        return self._networks.student

    @property
    def target(self) -> FlowModel:
        """The moving copy of the student."""
        return self._networks.target

    def phases(self) -> list[Phase]:
        """The one phase; its module holds student and copy, so that checkpoints keep both."""
        return [Phase("consistency", self._networks, self.loss)]

    def estimate(
        self,
        model: FlowModel,
        x: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
        **condition: Any,
    ) -> Float[Tensor, "b *dims"]:
        """The data that a model names at `(x, t)`, tied to the state at the data end.

        With "skip" and width w: `c_skip = w² alpha / (sigma² + w² alpha²)` and
        `c_out = sigma / sqrt(sigma² + w² alpha²)`.
        """
        data = model.denoise(x, t, **condition)
        if self.boundary == "first-order":
            return data
        time = expand(t, x)
        alpha, sigma = model.path.alpha(time), model.path.sigma(time)
        norm = sigma.square() + (self.width * alpha).square()
        return (self.width**2 * alpha / norm * x + sigma / norm.sqrt() * data).to(x.dtype)

    def loss(self, draw: Draw) -> Tensor:
        """The mean loss of the draw's rows; moves the copy once a training step."""
        self._follow(draw.step)
        pairs = self.coupling.draw(draw)
        path, condition = self.model.path, pairs.condition
        dtype = torch.promote_types(pairs.target.dtype, torch.float32)
        grid = torch.tensor(self._grid, dtype=dtype, device=pairs.target.device)
        intervals = len(grid) - 1
        index = (draw.uniform() * intervals).long().clamp(max=intervals - 1).to(grid.device)
        t, s = grid[index], grid[index + 1]
        x = path.interpolate(pairs.source, pairs.target, t).to(pairs.target.dtype)
        with torch.no_grad(), evaluating(self.teacher, x.device), evaluating(self.target):
            velocity = velocity_of(self.followed)(x, t, **condition)
            nearer = first_order_jump(path, velocity, x, t, s)
            wanted = self.estimate(self.target, nearer, s, **condition)
        found = self.estimate(self.model, x, t, **condition)
        return self.premetric(Regression(found, wanted, x, t, wanted, path, "data")).mean()

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the copy toward the student, at the first micro-batch of each step but the first."""
        if step > 0 and step != self._seen:
            average = list(self.target.parameters())
            torch._foreach_lerp_(average, list(self.model.parameters()), 1 - self.decay)
            for own, live in zip(self.target.buffers(), self.model.buffers()):
                own.copy_(live)
        self._seen = step


class _Networks(nn.Module):
    """The student, and the copy of it that makes targets."""

    def __init__(self, student: FlowModel) -> None:
        super().__init__()
        self.student = student
        self.target = student_of(student).requires_grad_(False)
