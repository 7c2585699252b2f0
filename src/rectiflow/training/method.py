"""What is trained: a method names its phases, the trainer runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from rectiflow.flows.couplings import Draw
from rectiflow.flows.fields import FlowModel
from rectiflow.training.optimizers import OptimizerSettings


@dataclass(frozen=True)
class Phase:
    """One set of parameters with the loss that moves them.

    Attributes:
        name: shown in logs and errors.
        module: holds the parameters that this phase trains.
        loss: the mean loss of the draw's rows.
        every: the phase runs on every so many training steps.
        optimizer: settings of its own; the trainer's by default.
        inspect: called with the draw of a step whose loss was not finite; says what is wrong with
            its data, or nothing.
        first: the first step on which it runs; its learning rate's schedule starts there.
        sampled: the mean loss of the draw's rows against targets drawn from the model itself, and
            how many were drawn; for losses that are a likelihood (SophiaG needs it).
    """

    name: str
    module: nn.Module
    loss: Callable[[Draw], Tensor]
    every: int = 1
    optimizer: OptimizerSettings | None = None
    inspect: Callable[[Draw], str] | None = None
    first: int = 0
    sampled: Callable[[Draw], tuple[Tensor, int]] | None = None

    def due(self, step: int) -> bool:
        """Whether the phase runs on a step."""
        return step >= self.first and (step - self.first) % self.every == 0


class PhaseModule(nn.Module):
    """A phase as a module whose forward is the loss, so that data-parallel wrappers see it all."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        # Named so that a wrapper's own "module." prefix can be told apart in state names.
        self.trained = phase.module
        self._loss = phase.loss

    def forward(self, draw: Draw) -> Tensor:
        return self._loss(draw)


class Method(Protocol):
    """What a trainer can train.

    A method may also have `check_training(settings)`: the trainer calls it with its settings
    before anything else, and it raises ValueError for a training that cannot give its model.
    """

    @property
    def model(self) -> FlowModel:
        """The model that training makes, averaged over steps."""

    def phases(self) -> Sequence[Phase]:
        """The phases, in the order in which a step runs them."""
