"""The batches of a training: all of one size, or growing with the gradient's noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rectiflow.errors import positive
from rectiflow.optim.batch_plan import BatchPlan
from rectiflow.optim.batch_size import BatchSizeController
from rectiflow.optim.batch_tests import NormTest
from rectiflow.optim.micro_batches import MicroBatchStatistics


@dataclass(frozen=True)
class GrowthSettings:
    """How `--batch-size auto` grows batches."""

    first: int = 32
    """Samples of the first batch; with several processes at least two on each."""
    largest: int = 2048
    """Most samples of a batch."""
    micro: int = 256
    """Most samples of a micro-batch; larger batches accumulate."""
    eta: float = 0.5
    """Relative error of the gradient that passes; smaller asks for larger batches."""
    interval: int = 10
    """Steps between tests."""
    parts: int = 8
    """Parts of a tested batch, whose gradients show the noise."""
    lr_scaling: str = "none"
    """What the learning rate follows as batches grow: none, sqrt or linear."""
    samples: int | None = None
    """Samples to train on in all: training ends with them and schedules of the rate follow their
    count; --steps is then the most updates, of which --optim.warmup is a share."""

    def __post_init__(self) -> None:
        self.controller(1)
        if self.samples is not None:
            positive("samples", self.samples)
        if self.parts < 2:
            raise ValueError(f"one gradient shows no noise: parts must be >= 2, got {self.parts}")

    def controller(self, processes: int) -> BatchSizeController:
        """A controller with these settings."""
        positive("micro", self.micro)
        # The noise is seen between micro-batches of one process, of which it takes two.
        least = min(2 * processes, self.largest) if processes > 1 else 1
        return BatchSizeController(
            NormTest(self.eta),
            max(self.first, least),
            b_max=self.largest,
            interval=self.interval,
            processes=processes,
            max_micro=self.micro,
            lr_scaling=self.lr_scaling,
        )


class Batches:
    """How each step's batch is cut, and how large the next one is.

    Batches that grow are tested every few steps: the same samples in more micro-batches, whose
    gradients show how noisy their mean is. Any loss will do, at no more samples than the step has.

    Args:
        size: samples of a micro-batch on one process, or "auto" to grow.
        accumulate: micro-batches of a step.
        growth: how to grow.
        process: number of this process.
        processes: how many there are.

    Source: arXiv 2402.11215; the variance from micro-batches is that of arXiv 2412.21124.
    """

    def __init__(
        self,
        size: int | Literal["auto"],
        accumulate: int,
        growth: GrowthSettings,
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.process, self.parts = process, growth.parts
        self.controller = None if isinstance(size, int) else growth.controller(processes)
        self._constant = BatchPlan(size if isinstance(size, int) else 1, accumulate, processes)
        self._watch: MicroBatchStatistics | None = None

    @property
    def plan(self) -> BatchPlan:
        """The plan of this step."""
        return self._constant if self.controller is None else self.controller.plan

    @property
    def kind(self) -> int | str:
        """The size of all batches, or "auto"."""
        return self._constant.size if self.controller is None else "auto"

    @property
    def lr_factor(self) -> float:
        """By what to multiply the learning rate."""
        return 1.0 if self.controller is None else self.controller.lr_factor

    def before(self, step: int) -> int:
        """Samples of all steps before this one."""
        return step * self._constant.size if self.controller is None else self.controller.samples

    def micros(self) -> list[slice]:
        """The rows of each of this process's micro-batches, all equally many."""
        return self._cut(self.plan.accumulate)

    def begin(self, parameters: Iterable[nn.Parameter], *, scale: float = 1.0) -> list[slice]:
        """The rows whose gradients to add up: more and smaller micro-batches where a test is due.

        Args:
            parameters: what is trained.
            scale: the factor of a gradient scaler.
        """
        plan, self._watch = self.plan, None
        if self.controller is None or not self.controller.due:
            return self.micros()
        each = plan.micro * plan.accumulate
        # The last pass of several processes shows their mean alone.
        unseen = int(plan.processes > 1)
        wanted = math.ceil(self.parts / plan.processes) + unseen
        count = min(each, max(plan.accumulate, wanted))
        if count == unseen:
            return self.micros()
        size = each // count
        self._watch = MicroBatchStatistics(parameters, unit=size, times=each / size / scale)
        return self._cut(count)

    def _cut(self, count: int) -> list[slice]:
        """This process's rows in equal parts, with what is left over behind them."""
        each = self.plan.micro * self.plan.accumulate
        size, first = each // count, self.process * each
        cuts = [first + size * part for part in range(count + 1)]
        found = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
        return found if size * count == each else [*found, slice(cuts[-1], first + each)]

    def observe(self, rows: slice, *, last: bool) -> None:
        """Take what the backward pass of some rows added to the gradients.

        What does not divide evenly is left out; so is the last pass of several processes, which
        averages their gradients.
        """
        watch = self._watch
        if watch is None or rows.stop - rows.start != watch.unit:
            return
        if not (last and self.plan.processes > 1):
            watch.observe()

    def test(self) -> None:
        """Plan the next step's batch, if this step's was looked at and its gradients are finite."""
        if self._watch is None or self.controller is None:
            return
        found = self._watch.statistics()
        if math.isfinite(found.noise):
            self.controller.test(lambda: found)

    def advance(self) -> None:
        """Note that the step was taken."""
        if self.controller is not None:
            self.controller.advance()

    def numbers(self) -> dict[str, float]:
        """What a log says of batches that grow."""
        if self.controller is None:
            return {}
        found = {"batch_size": float(self.plan.size)}
        if self.controller.records:
            found["signal_to_noise"] = self.controller.records[-1].signal_to_noise
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a training that resumes needs, as plain values."""
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        if self.controller is not None:
            self.controller.load_state_dict(state)
