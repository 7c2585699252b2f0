"""Batch sizes that grow when the gradient's variance asks for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rectiflow.errors import positive, unknown
from rectiflow.optim.batch_plan import BatchPlan
from rectiflow.optim.batch_tests import BatchTest, needed
from rectiflow.optim.gradient_statistics import GradientStatistics

SCALINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True)
class BatchRecord:
    """What one test found.

    Attributes:
        step: training step.
        samples: samples seen before it.
        batch_size: the batch tested.
        noise: summed variance of the gradients of samples.
        signal: squared norm of the mean gradient.
        needed: the batch that the test asks for.
        plan: the batch of the next step.
        seconds: wall time of the test.
    """

    step: int
    samples: int
    batch_size: int
    noise: float
    signal: float
    needed: float
    plan: BatchPlan
    seconds: float

    @property
    def signal_to_noise(self) -> float:
        """Squared norm of the batch's gradient over its variance."""
        return math.inf if not self.noise else self.signal * self.batch_size / self.noise


class BatchSizeController:
    """Grows the batch of a training, for any optimizer.

    Each step takes a batch of `controller.plan`. Before the optimizer moves the weights,
    `if controller.due: controller.test(lambda: statistics)`; behind it, `controller.advance()`,
    from which the plan is that of the next batch. Batches never shrink.

    Args:
        test: `NormTest`, `InnerProductTest` or another `BatchTest`.
        batch_size: the first batch over all processes, >= 2.
        b_max: the largest; near a minimum the tests ask for ever more.
        interval: steps between tests.
        max_growth: largest factor of one test.
        ema: weight of earlier tests in noise and signal; 0 looks at the last alone.
        processes: processes that share a batch.
        max_micro: most samples of a micro-batch; larger batches accumulate.
        lr_scaling: what `lr_factor` follows: "none" (the paper), "sqrt" or "linear".

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> import torch
        >>> from rectiflow.optim import NormTest, per_sample_statistics
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> rows = [torch.tensor([[1.0], [3.0]])]
        >>> controller = BatchSizeController(NormTest(0.1), 2, b_max=64, max_micro=32)
        >>> controller.test(
        ...     lambda: per_sample_statistics(net, lambda net, x: net(x).sum(), rows))
        BatchPlan(micro=25, accumulate=2, processes=1)

    Source: arXiv 2402.11215, algorithm 1. `max_growth` and `ema` are ours.
    """

    def __init__(
        self,
        test: BatchTest,
        batch_size: int,
        *,
        b_max: int,
        interval: int = 10,
        max_growth: float = math.inf,
        ema: float = 0.0,
        processes: int = 1,
        max_micro: int | None = None,
        lr_scaling: str = "none",
    ) -> None:
        positive("interval", interval)
        if batch_size < 2:
            raise ValueError(f"a batch of {batch_size} has no variance: begin with 2 or more")
        if b_max < batch_size:
            raise ValueError(f"b_max must be at least the first batch, {batch_size}, got {b_max}")
        if not max_growth > 1:
            raise ValueError(f"max_growth must be > 1, got {max_growth}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {ema}")
        if lr_scaling not in SCALINGS:
            raise unknown("learning-rate scaling", lr_scaling, SCALINGS)
        self.rule, self.b_max, self.interval = test, b_max, interval
        self.max_growth, self.ema, self.lr_scaling = max_growth, ema, lr_scaling
        self.max_micro = max_micro
        self.plan = BatchPlan.of(
            batch_size, processes=processes, max_micro=max_micro, at_most=b_max
        )
        # Equal micro-batches may miss b_max by some samples.
        self.most = BatchPlan.of(
            b_max, processes=processes, max_micro=max_micro, at_most=b_max
        ).size
        self._coming = self.plan
        self.first = self.plan.size
        self.step = self.samples = 0
        self.records: list[BatchRecord] = []
        self._smooth: list[tuple[float, float]] = []

    @property
    def batch_size(self) -> int:
        """Samples of this step's batch, over all processes."""
        return self.plan.size

    @property
    def due(self) -> bool:
        """Whether this step's batch should be tested."""
        return self.step % self.interval == 0 and self.batch_size < self.most

    @property
    def lr_factor(self) -> float:
        """By what to multiply the learning rate of the first batch."""
        return (self.batch_size / self.first) ** SCALINGS[self.lr_scaling]

    def advance(self) -> None:
        """Note that the step was taken; the plan becomes that of the next one."""
        self.samples += self.plan.size
        self.step += 1
        self.plan = self._coming

    def test(self, statistics: Callable[[], GradientStatistics]) -> BatchPlan:
        """Test this step's batch and plan the next one.

        Args:
            statistics: computes what the test looks at; its time is recorded.

        Returns:
            the plan of the next batch.

        Raises:
            ValueError: gradients with NaN, or statistics that lack what the test needs.
        """
        begun = time.perf_counter()
        found = statistics()
        wanted = needed(self._smoothed(self.rule.measures(found)))
        before = self.plan
        grown = min(max(before.size, wanted), before.size * self.max_growth, self.b_max)
        proposed = BatchPlan.of(
            math.ceil(grown),
            processes=before.processes,
            max_micro=self.max_micro,
            at_most=self.b_max,
        )
        if proposed.size > before.size:
            self._coming = proposed
        self.records.append(
            BatchRecord(
                self.step, self.samples, before.size, found.noise, found.signal, wanted,
                self._coming, time.perf_counter() - begun,
            )
        )  # fmt: skip
        return self._coming

    def _smoothed(self, new: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        """Means over tests, where asked for; both of a pair weigh tests alike."""
        if not self.ema:
            return new
        before = self._smooth or [(0.0, 0.0)] * len(new)
        self._smooth = [
            (self.ema * n + (1 - self.ema) * noise, self.ema * s + (1 - self.ema) * signal)
            for (n, s), (noise, signal) in zip(before, new)
        ]
        return tuple(self._smooth)

    def state_dict(self) -> dict[str, Any]:
        """What a training that resumes with the next step needs, as plain values."""
        return {
            "step": self.step,
            "samples": self.samples,
            "plan": asdict(self._coming),
            "first": self.first,
            "smooth": [list(pair) for pair in self._smooth],
            "records": [asdict(record) for record in self.records],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of as many processes.

        Raises:
            ValueError: the state is of another number of processes.
        """
        planned = BatchPlan(**state["plan"])
        if planned.processes != self.plan.processes:
            raise ValueError(
                f"batches grew on {planned.processes} processes, and now there are "
                f"{self.plan.processes}: go on with as many as before"
            )
        self.plan = self._coming = planned
        self.step, self.samples, self.first = state["step"], state["samples"], state["first"]
        self._smooth = [(noise, signal) for noise, signal in state["smooth"]]
        self.records = [
            BatchRecord(**{**record, "plan": BatchPlan(**record["plan"])})
            for record in state["records"]
        ]
