"""Shuffled epochs in batches whose size may change."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rectiflow.errors import positive


class ResizableBatches:
    """Endless batches of indices in shuffled epochs, whose size may change at any time.

    A batch sampler for `torch.utils.data.DataLoader`: set `batch_size` between batches, and every
    index still comes once an epoch. Order follows from seed and position alone, so a resumed
    training goes on exactly. Workers of a loader fetch some batches ahead of a change, and
    `state_dict` has the position after those: with workers, save and load
    `{"position": used, "batch_size": size}`, where `used` counts the samples of all steps so far,
    over all processes and earlier resumes.

    Args:
        count: size of the data set.
        batch_size: samples of a batch over all processes, for now.
        seed: seed of the order.
        process: number of this process; it gets an equal share of each batch.
        processes: how many there are; they divide the batch size.

    Raises:
        ValueError: numbers that are not positive, or a batch that processes cannot share.

    Example:
        >>> batches = ResizableBatches(4, 2)
        >>> stream = iter(batches)
        >>> first = next(stream)
        >>> batches.batch_size = 6
        >>> sorted(first + next(stream)[:2])
        [0, 1, 2, 3]
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int = 0, process: int = 0, processes: int = 1
    ) -> None:
        for name, value in (("count", count), ("batch_size", batch_size), ("processes", processes)):
            positive(name, value)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.process, self.processes = process, processes
        self.position = 0
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            if self.batch_size % self.processes:
                raise ValueError(
                    f"{self.processes} processes cannot share a batch of {self.batch_size} "
                    "equally: plan() gives sizes that they can"
                )
            share = self.batch_size // self.processes
            first = self.position + self.process * share
            self.position += self.batch_size
            yield self._between(first, first + share)

    def _between(self, first: int, stop: int) -> list[int]:
        """The indices at some places of the endless order."""
        found: list[int] = []
        while first < stop:
            epoch, offset = divmod(first, self.count)
            if epoch != self._epoch:
                mixed = (self.seed * 0x9E3779B97F4A7C15 + epoch + 1) % (1 << 63)
                generator = torch.Generator().manual_seed(mixed)
                self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
            part = self._order[offset : offset + stop - first].tolist()
            found += part
            first += len(part)
        return found

    def state_dict(self) -> dict[str, int]:
        """The position in the order, and the size of a batch."""
        return {"position": self.position, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state."""
        self.position, self.batch_size = state["position"], state["batch_size"]
