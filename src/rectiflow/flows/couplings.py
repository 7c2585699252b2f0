"""Couplings: which source is paired with which target.

A coupling turns a `Draw` (which part of which training step) into `Pairs`. Drawing is a pure
function of the draw, so training resumes exactly from a step number alone, and several processes
or micro-batches make together what one process would make alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rectiflow.errors import PairStoreError, require
from rectiflow.flows.fields import FlowModel, evaluating
from rectiflow.flows.integration import integrate
from rectiflow.flows.pair_store import PairStore
from rectiflow.flows.solvers import refuse_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Pairs:
    """Sources with their targets.

    Attributes:
        source: the noise end, `(b, ...)`.
        target: the data end, `(b, ...)`.
        condition: what the pair belongs to; tensors have one row a pair.
    """

    source: Tensor
    target: Tensor
    condition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """One process's part of one training step, with randomness shared by all processes.

    Every process seeds the same generator, draws for the whole step and keeps its rows, so the
    step does not depend on how many processes or micro-batches share it.

    Attributes:
        step: number of the training step.
        size: samples of the whole step.
        part: the rows wanted here.
        seed: seed of the training.
        generator: seeded for this step; on the device of the training.
        before: samples of all earlier steps; step times size by default.
    """

    step: int
    size: int
    part: slice
    seed: int
    generator: torch.Generator
    before: int | None = None

    @classmethod
    def of(
        cls,
        size: int,
        *,
        step: int = 0,
        seed: int = 0,
        part: slice | None = None,
        generator: torch.Generator | None = None,
        before: int | None = None,
    ) -> Draw:
        """The draw of a step; a given generator is reseeded.

        Example:
            >>> whole = Draw.of(4).normal((2,))
            >>> bool((Draw.of(4, part=slice(2, 4)).normal((2,)) == whole[2:]).all())
            True
        """
        generator = generator if generator is not None else torch.Generator()
        # Odd 64-bit constants keep neighbouring seeds and steps far apart.
        mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
        generator.manual_seed(mixed)
        part = part if part is not None else slice(0, size)
        return cls(step, size, part, seed, generator, before)

    @property
    def device(self) -> torch.device:
        """Where tensors are drawn."""
        return self.generator.device

    def normal(self, shape: Sequence[int]) -> Float[Tensor, "b *shape"]:
        """Standard normal rows of the given shape."""
        whole = (self.size, *shape)
        return torch.randn(whole, generator=self.generator, device=self.device)[self.part]

    def uniform(self) -> Float[Tensor, " b"]:
        """Numbers in [0, 1)."""
        return torch.rand(self.size, generator=self.generator, device=self.device)[self.part]

    def indices(self, count: int, *, stream: int = 0) -> Int[Tensor, " b"]:
        """Rows of a data set of `count` samples, in shuffled epochs without repetition.

        Args:
            count: size of the data set.
            stream: another number gives an independent order of the same seed.
        """
        first = self.step * self.size if self.before is None else self.before
        positions = torch.arange(first + self.part.start, first + self.part.stop)
        epochs = positions // count
        offsets = positions % count
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            rows[here] = _shuffled(count, self.seed, stream, epoch)[offsets[here]]
        return rows


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, stream: int, epoch: int) -> Tensor:
    mixed = (seed * 0x94D049BB133111EB + stream * 0xD6E8FEB86659FD93 + epoch + 1) % (1 << 63)
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


class Data(Protocol):
    """What couplings read: `training.data.ImageData`, `TensorData` or anything alike."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, indices: Tensor) -> Tensor:
        """Samples, `(b, ...)`."""

    def condition(self, indices: Tensor) -> dict[str, Tensor]:
        """Their conditions, one row a sample."""


@dataclass(frozen=True)
class TensorData:
    """Tensors as data.

    Args:
        values: samples, `(n, ...)`.
        conditions: tensors of n rows by name.
    """

    values: Tensor
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.conditions.items():
            if value.shape[0] != self.values.shape[0]:
                raise ValueError(
                    f"condition {name!r} has {value.shape[0]} rows for "
                    f"{self.values.shape[0]} samples"
                )

    def __len__(self) -> int:
        return self.values.shape[0]

    def batch(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b *dims"]:
        return self.values[indices.to(self.values.device)]

    def condition(self, indices: Int[Tensor, " b"]) -> dict[str, Tensor]:
        return {name: v[indices.to(v.device)] for name, v in self.conditions.items()}


class Coupling(Protocol):
    """Makes pairs for a part of a training step."""

    def draw(self, draw: Draw) -> Pairs:
        """The pairs, on the draw's device."""


def batches(coupling: Coupling, size: int, *, seed: int = 0) -> Iterator[Pairs]:
    """An endless iterator over a coupling, for hand-written loops.

    Example:
        >>> data = TensorData(torch.zeros(10, 2))
        >>> next(batches(Independent(data), 4)).source.shape
        torch.Size([4, 2])
    """
    step = 0
    while True:
        yield coupling.draw(Draw.of(size, step=step, seed=seed))
        step += 1


def as_data(data: Data | Tensor) -> Data:
    """A tensor wrapped as data; data as they are."""
    return TensorData(data) if isinstance(data, Tensor) else data


def draw_data(data: Data | Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
    """The data of a draw's rows and their conditions, on its device."""
    data = as_data(data)
    rows = draw.indices(len(data))
    target = data.batch(rows).to(draw.device, non_blocking=True)
    return target, {name: v.to(draw.device) for name, v in data.condition(rows).items()}


@dataclass(frozen=True)
class Independent:
    """Sources drawn independently of targets: the start of every rectified flow.

    Args:
        data: the targets.
        source: the sources, for transfer between two data sets; standard normal noise otherwise.

    Source: arXiv 2209.03003, section 2.1.
    """

    data: Data | Tensor
    source: Data | Tensor | None = None

    def draw(self, draw: Draw) -> Pairs:
        target, condition = draw_data(self.data, draw)
        if self.source is None:
            return Pairs(draw.normal(target.shape[1:]), target, condition)
        origin = as_data(self.source)
        source = origin.batch(draw.indices(len(origin), stream=1)).to(draw.device)
        return Pairs(source, target, condition)


@dataclass(frozen=True)
class MinibatchOT:
    """The pairs of another coupling, with sources reassigned at least total squared distance.

    Assignment is exact (POT's network simplex) within the part drawn at once. With a condition,
    sources are exchanged only between samples of equal condition: an assignment across conditions
    would tie the noise to the condition, and sampling with fresh noise would suffer. A condition
    that is not a discrete label is refused.

    Args:
        coupling: where sources and targets come from.

    Source: arXiv 2302.00482, section 3.4 (minibatch optimal transport).
    """

    coupling: Coupling

    def __post_init__(self) -> None:
        require("ot", "ot")

    def draw(self, draw: Draw) -> Pairs:
        pairs = self.coupling.draw(draw)
        groups = _groups(pairs.condition, pairs.target.shape[0])
        order = torch.arange(pairs.target.shape[0])
        for rows in groups:
            order[rows] = rows[_assign(pairs.source[rows], pairs.target[rows])]
        return replace(pairs, source=pairs.source[order.to(pairs.source.device)])


def _groups(condition: dict[str, Any], count: int) -> list[Tensor]:
    """Rows of equal condition."""
    if not condition:
        return [torch.arange(count)]
    for name, value in condition.items():
        if not isinstance(value, Tensor) or value.ndim != 1 or value.is_floating_point():
            raise ValueError(
                f"optimal transport within a condition needs discrete labels of shape (b,), but "
                f"{name!r} is not one: use the independent coupling"
            )
    keys = torch.stack([value.cpu() for value in condition.values()], 1)
    _, group = torch.unique(keys, dim=0, return_inverse=True)
    return [torch.nonzero(group == g).squeeze(1) for g in range(int(group.max()) + 1)]


def _assign(source: Tensor, target: Tensor) -> Tensor:
    """For each target the index of its source, at least total squared distance."""
    import ot

    count = target.shape[0]
    cost = torch.cdist(target.flatten(1).double(), source.flatten(1).double()).square()
    plan = ot.emd(ot.unif(count), ot.unif(count), cost.cpu().numpy(), numItermax=1_000_000)
    return torch.from_numpy(plan.argmax(1))


@dataclass(frozen=True)
class StoredPairs:
    """The pairs of a store, each once an epoch, exactly as the teacher made them.

    This is the coupling of reflow and distillation. Sources are never exchanged between pairs,
    no fresh noise is added, and nothing is done to one side only (a flipped target with an
    unflipped source is a wrong pair).

    Args:
        store: a store, or its folder.
        expects: SHA-256 of the teacher's weights (as in its `config.json`); pairs of another
            teacher are refused.

    Raises:
        PairStoreError: the store is damaged or unfinished, or made by another teacher.

    Source: arXiv 2209.03003, algorithm 1.
    """

    store: PairStore | str | FilePath
    expects: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.store, PairStore):
            object.__setattr__(self, "store", PairStore(self.store))
        assert isinstance(self.store, PairStore)
        settings, missing = self.store.settings, self.store.missing
        if missing:
            raise PairStoreError(
                f"{self.store.folder} lacks {len(missing)} of {settings.shards} shards: generate "
                "the pairs again with the same settings to finish it"
            )
        found = settings.teacher["sha256"]
        if self.expects is not None and found != self.expects:
            raise PairStoreError(
                f"{self.store.folder} was made by a teacher with weights {str(found)[:12]}, not "
                f"{self.expects[:12]}: generate pairs with this teacher"
            )

    def draw(self, draw: Draw) -> Pairs:
        assert isinstance(self.store, PairStore)
        source, target, condition = self.store.rows(draw.indices(len(self.store)))
        return Pairs(
            source.to(draw.device, non_blocking=True),
            target.to(draw.device, non_blocking=True),
            {name: value.to(draw.device) for name, value in condition.items()},
        )


def innermost(coupling: Any) -> Any:
    """The coupling inside all that are around it."""
    while (inner := getattr(coupling, "coupling", None)) is not None:
        coupling = inner
    return coupling


@dataclass(frozen=True)
class LivePairs:
    """Pairs made while training: fresh noise, and where a teacher carries it.

    Saves the disk of stored pairs at the price of the teacher's evaluations in every step.

    Args:
        teacher: the model to follow; never trained here.
        steps: its number of steps.
        solver: its solver; no stochastic one.
        labels: data whose conditions the pairs take; none for an unconditional teacher.
        guided: a field around the teacher (guidance) to follow instead of the teacher itself.

    Source: arXiv 2209.03003, algorithm 1; 20 Euler steps of the averaged teacher as in the
        official code's online variant.
    """

    teacher: FlowModel
    steps: int = 20
    solver: Any = "euler"
    labels: Data | None = None
    guided: Any = None

    def __post_init__(self) -> None:
        refuse_noise(self.solver, "pairs join a noise to the one sample a teacher makes of it")

    def draw(self, draw: Draw) -> Pairs:
        if self.teacher.shape is None:
            raise ValueError("the teacher does not know its sample shape: set shape=")
        condition: dict[str, Any] = {}
        if self.labels is not None:
            found = self.labels.condition(draw.indices(len(self.labels)))
            condition = {name: value.to(draw.device) for name, value in found.items()}
        source = draw.normal(self.teacher.shape)
        start = self.teacher.path.start(source)
        with torch.no_grad(), evaluating(self.teacher, draw.device):
            target = integrate(
                self.guided if self.guided is not None else self.teacher,
                start,
                self.steps,
                self.solver,
                generator=draw.generator,
                **condition,
            )
        return Pairs(source, target, condition)
