"""How a batch is shared by processes and micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rectiflow.errors import positive


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is made.

    Attributes:
        micro: samples of one micro-batch on one process.
        accumulate: micro-batches added up before an update.
        processes: processes.
    """

    micro: int
    accumulate: int = 1
    processes: int = 1

    @property
    def size(self) -> int:
        """Samples of the whole batch."""
        return self.micro * self.accumulate * self.processes

    @classmethod
    def of(
        cls,
        size: int,
        *,
        processes: int = 1,
        max_micro: int | None = None,
        at_most: int | None = None,
    ) -> BatchPlan:
        """The fewest micro-batches, of equal sizes, that hold `size` samples.

        Args:
            size: samples asked for.
            processes: processes that share them.
            max_micro: most samples of one micro-batch; any number by default.
            at_most: most samples of the whole; where equal parts would be more, each is smaller.

        Returns:
            the plan; its size is at least `size` unless `at_most` forbids it.

        Raises:
            ValueError: numbers that are not positive, or `at_most` below the number of processes.

        Example:
            >>> BatchPlan.of(100, processes=2, max_micro=20)
            BatchPlan(micro=17, accumulate=3, processes=2)
        """
        for name, value in (("size", size), ("processes", processes), ("max_micro", max_micro)):
            if value is not None:
                positive(name, value)
        if at_most is not None and at_most < processes:
            raise ValueError(f"{processes} processes cannot share a batch of at most {at_most}")
        each = math.ceil(size / processes)
        if at_most is not None:
            each = min(each, at_most // processes)
        accumulate = 1 if max_micro is None else math.ceil(each / max_micro)
        micro = math.ceil(each / accumulate)
        if at_most is not None and micro * accumulate * processes > at_most:
            micro -= 1
        return cls(micro, accumulate, processes)
