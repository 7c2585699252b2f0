"""Stored pairs of real data with the noise that a flow assigns to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from rectiflow.distill.generation import (
    _claim,
    _finish,
    _rows_digest,
    _sweep,
    _whole,
    describe_field,
)
from rectiflow.distill.quality import PairGate, check_pairs
from rectiflow.errors import PairQualityError, positive
from rectiflow.flows import pair_format
from rectiflow.flows.artifact import identity
from rectiflow.flows.couplings import Data, Pairs, as_data
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.inverted_pairs import falling_times, invert
from rectiflow.flows.pair_format import DTYPES, PairSettings
from rectiflow.flows.pair_store import PairStore


def invert_pairs(
    model: FlowModel,
    folder: str | FilePath,
    data: Data | Tensor,
    *,
    count: int | None = None,
    solver: Any = "heun",
    steps: int | Sequence[float] = 64,
    noise: float = 1e-3,
    seed: int = 0,
    batch_size: int = 1024,
    shard_size: int = 4096,
    field: Any = None,
    gate: PairGate | None = PairGate(),  # noqa: B008 - frozen
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PairStore:
    """Write (inverted noise, real image) pairs, in the order of the data, for a last training.

    The store reads like that of `generate_pairs`, and a killed run goes on alike. The pairs are
    those of `InvertedPairs`, inverted once instead of in every step.

    Args:
        model: the flow to follow backward.
        folder: where the store goes, or is.
        data: the targets; their conditions go to the model and into the store.
        count: how many of them, from the first; all by default.
        solver: an ODE solver.
        steps: number of steps, or a falling grid of times.
        noise: noise level at which inversions begin.
        seed: decides the noise mixed in there.
        batch_size: images inverted together.
        shard_size: pairs in a file.
        field: a guided field around the model, to be followed in its place.
        gate: checks on the first pairs that the images come back; None trusts the solver.
        overwrite: delete an existing store of other settings first.
        progress: called with the number of pairs done.

    Raises:
        PairQualityError: the solver is too coarse, or a noise is not finite.
        RunExistsError: the folder holds pairs of other settings.
        ValueError: settings out of range, data of another shape.

    Source: arXiv 2405.20320, section 4.3 (configuration G).
    """
    folder, data = FilePath(folder), as_data(data)
    positive("batch_size", batch_size)
    positive("shard_size", shard_size)
    if model.shape is None:
        raise ValueError("the model does not know its sample shape: set shape=")
    count = len(data) if count is None else count
    if not 1 <= count <= len(data):
        raise ValueError(f"count must be from 1 to the {len(data)} samples, got {count}")
    times = falling_times(steps, noise)
    settings = _settings(model, data, count, shard_size, seed, solver, times, field)
    maker = _Inverter(model, data, settings, solver, times, noise, batch_size, field)
    _claim(folder, settings, overwrite)
    _sweep(folder, range(settings.shards), everything=True)
    done = 0
    for shard in range(settings.shards):
        rows = settings.rows_of(shard)
        if not _whole(folder, settings, shard):
            if gate is not None and not done:
                maker.examine(gate)
            source, target, condition = maker.pairs(shard, rows)
            finite = torch.isfinite(source).flatten(1).all(1)
            if not finite.all():
                raise PairQualityError(
                    f"{int((~finite).sum())} of {len(finite)} noises of shard {shard} are not "
                    "finite: check the model's weights or take more steps"
                )
            pair_format.write_shard(folder, settings, shard, source, target, condition)
        done += rows
        if progress is not None:
            progress(done)
    return _finish(folder, settings)


@dataclass(frozen=True)
class _Inverter:
    """Makes the rows of any shard."""

    model: FlowModel
    data: Data
    settings: PairSettings
    solver: Any
    times: list[float]
    noise: float
    batch_size: int
    field: Any

    def pairs(self, shard: int, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sources, targets and conditions of the first rows of a shard."""
        first = shard * self.settings.shard_size
        indices = torch.arange(first, first + rows)
        target = self.data.batch(indices).cpu().float()
        condition = {name: v.cpu() for name, v in self.data.condition(indices).items()}
        fresh = pair_format.normal_sources(self.settings, shard)[:rows]
        device = device_of(self.model)
        source = torch.empty_like(target)
        for begin in range(0, rows, self.batch_size):
            part = slice(begin, begin + self.batch_size)
            with torch.autocast(device.type, enabled=False):
                source[part] = invert(
                    self.model,
                    target[part].to(device),
                    fresh[part].to(device),
                    steps=self.times,
                    solver=self.solver,
                    noise=self.noise,
                    field=self.field,
                    **{name: value[part].to(device) for name, value in condition.items()},
                )
        return source, target, condition

    def examine(self, gate: PairGate) -> None:
        """Put the first pairs through the gate."""
        rows = min(gate.pairs, self.settings.rows_of(0))
        if rows < 2:
            return
        source, target, condition = self.pairs(0, rows)
        check_pairs(
            self.model,
            Pairs(source, target, condition),
            solver=self.solver,
            steps=self.times[::-1],
            gate=gate,
            field=self.field,
            batch_size=self.batch_size,
        ).require()


def _settings(
    model: FlowModel,
    data: Data,
    count: int,
    shard_size: int,
    seed: int,
    solver: Any,
    times: list[float],
    field: Any,
) -> PairSettings:
    """What decides the contents, checked on the first sample."""
    head = torch.arange(min(count, shard_size))
    condition = {name: value.cpu() for name, value in data.condition(head).items()}
    first = data.batch(head).cpu().float()
    model.check(first[:1], **{name: value[:1] for name, value in condition.items()})
    known = {kind: name for name, (kind, _) in DTYPES.items()}
    for name, value in condition.items():
        if value.dtype not in known:
            raise ValueError(f"condition {name!r} has dtype {value.dtype}, which cannot be stored")
    assert model.shape is not None
    return PairSettings(
        count=count,
        shard_size=shard_size,
        shape=model.shape,
        seed=seed,
        source="inverted",
        solver=pair_format.describe_solver(solver),
        # Readers follow pairs from noise to data, so the grid is kept in that direction.
        times=times[::-1],
        path=model.path.config(),
        conditions={
            name: {"dtype": known[value.dtype], "shape": list(value.shape[1:])}
            for name, value in condition.items()
        },
        rows=_rows_digest({**condition, "": first}, data),
        teacher={"sha256": identity(model), "lineage": model.lineage},
        guidance=None if field is None else describe_field(field),
    )
