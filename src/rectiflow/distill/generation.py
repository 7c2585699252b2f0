"""Pairs from a teacher: noises, and where its flow carries them, written shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.distill.quality import PairGate, check_pairs
from rectiflow.errors import PairQualityError, PairStoreError, RunExistsError, positive, unknown
from rectiflow.flows import pair_format
from rectiflow.flows.artifact import identity
from rectiflow.flows.couplings import Data, Draw, Pairs
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.integration import integrate, time_grid
from rectiflow.flows.pair_format import DTYPES, STORE, PairSettings, shard_file
from rectiflow.flows.pair_store import PairStore
from rectiflow.flows.solvers import refuse_noise

if TYPE_CHECKING:
    from jaxtyping import Float

STORES = ("noise", "seed")


def generate_pairs(
    model: FlowModel,
    folder: str | FilePath,
    count: int,
    *,
    solver: Any = "euler",
    steps: int | Sequence[float] = 100,
    seed: int = 0,
    batch_size: int = 1024,
    shard_size: int = 4096,
    conditions: Data | None = None,
    source: Data | None = None,
    store: str = "noise",
    dtype: torch.dtype = torch.float32,
    field: Any = None,
    process_index: int = 0,
    process_count: int = 1,
    gate: PairGate | None = PairGate(),  # noqa: B008 - frozen
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PairStore:
    """Write (noise, result) pairs of a teacher into a folder, for reflow and distillation.

    Every shard depends on the settings and its own number alone. So a run that was killed goes on
    where it stopped and ends with the same bytes, and several processes (each with its
    `process_index`) share the work through the folder without talking to each other. The teacher
    runs in evaluation mode and float32. Memory is bounded by three shards.

    Args:
        model: the teacher, usually the averaged weights of a trained flow.
        folder: where the store goes, or is.
        count: number of pairs.
        solver: an ODE solver; its error becomes part of what is learned.
        steps: number of steps or grid of times.
        seed: decides all noises and which condition each pair gets.
        batch_size: pairs followed together. Noises do not depend on it; results do to rounding
            (for the adaptive solver, to its tolerance).
        shard_size: pairs in a file; at most this many are lost by a kill.
        conditions: data whose conditions the pairs take, in shuffled epochs.
        source: data to start from instead of noise, for transfer between two data sets.
        store: "noise" writes the sources; "seed" draws them again when reading, which halves the
            disk and is meant for stores whose noises fit in memory.
        dtype: of the stored targets: float32, or float16 (relative error 5e-4).
        field: a guided field around the teacher, to be followed in its place.
        process_index: which of the processes this is.
        process_count: how many share the work.
        gate: checks the first pairs before the work begins; None trusts the solver.
        overwrite: delete an existing store of other settings first.
        progress: called with the number of pairs done by this process.

    Returns:
        the store; incomplete while other processes are still at work.

    Raises:
        PairQualityError: the solver is too coarse for this teacher, or a result is not finite.
        RunExistsError: the folder holds pairs of other settings.
        ValueError: settings out of range, a stochastic solver, or a teacher in half precision.

    Example:
        >>> import tempfile
        >>> model = FlowModel(lambda x, t: -x, shape=(2,))
        >>> generate_pairs(model, tempfile.mkdtemp(), 100, solver="rk4", steps=8).complete
        True

    Source: arXiv 2209.03003, algorithm 1.
    """
    folder = FilePath(folder)
    _check_arguments(model, solver, batch_size, process_index, process_count, overwrite)
    settings = _settings(
        model, count, solver, steps, seed, shard_size, conditions, source, store, dtype, field
    )
    maker = _Maker(model, field, solver, steps, settings, batch_size, conditions, source)
    _claim(folder, settings, overwrite)
    mine = range(process_index, settings.shards, process_count)
    _sweep(folder, mine, everything=process_count == 1)
    todo = [shard for shard in mine if not _whole(folder, settings, shard)]
    if gate is not None and todo:
        maker.examine(gate)
    done = sum(settings.rows_of(shard) for shard in mine if shard not in set(todo))
    _write_all(folder, maker, todo, done, progress)
    return _finish(folder, settings)


@dataclass(frozen=True)
class _Maker:
    """Makes the rows of any shard."""

    model: FlowModel
    field: Any
    solver: Any
    steps: int | Sequence[float]
    settings: PairSettings
    batch_size: int
    conditions: Data | None
    source: Data | None

    def given(self, shard: int, limit: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Sources and conditions of a shard."""
        settings = self.settings
        rows = settings.rows_of(shard) if limit is None else min(limit, settings.rows_of(shard))
        draw = Draw.of(settings.shard_size, step=shard, seed=settings.seed, part=slice(0, rows))
        condition: dict[str, Tensor] = {}
        if self.conditions is not None:
            found = self.conditions.condition(draw.indices(len(self.conditions)))
            condition = {name: value.cpu() for name, value in found.items()}
        if self.source is None:
            return pair_format.normal_sources(settings, shard)[:rows], condition
        indices = draw.indices(len(self.source), stream=1)
        return self.source.batch(indices).cpu().float(), condition

    @torch.no_grad()
    def follow(
        self, source: Float[Tensor, "b *dims"], condition: dict[str, Tensor]
    ) -> Iterator[tuple[slice, Float[Tensor, "part *dims"]]]:
        """The results, batch by batch, with the rows they belong to."""
        device = device_of(self.model)
        field = self.field if self.field is not None else self.model
        for begin in range(0, source.shape[0], self.batch_size):
            part = slice(begin, min(begin + self.batch_size, source.shape[0]))
            start = self.model.path.start(source[part].to(device))
            rows = {name: value[part].to(device) for name, value in condition.items()}
            # Under autocast the pairs would carry half-precision errors into the next flow.
            with evaluating(self.model), torch.autocast(device.type, enabled=False):
                yield part, integrate(field, start, self.steps, self.solver, **rows)

    def examine(self, gate: PairGate) -> None:
        """Put the first pairs through the gate."""
        source, condition = self.given(0, gate.pairs)
        if source.shape[0] < 2:
            return
        target = torch.cat([found for _, found in self.follow(source, condition)])
        check_pairs(
            self.model,
            Pairs(source, target.to(DTYPES[self.settings.dtype][0]).float(), condition),
            solver=self.solver,
            steps=self.steps,
            gate=gate,
            field=self.field,
            batch_size=self.batch_size,
        ).require()


def _write_all(
    folder: FilePath,
    maker: _Maker,
    todo: Sequence[int],
    done: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Make shards while a thread writes the one before."""
    settings = maker.settings
    dtype = DTYPES[settings.dtype][0]
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for shard in todo:
            source, condition = maker.given(shard)
            target = torch.empty(source.shape, dtype=dtype)
            for part, found in maker.follow(source, condition):
                target[part] = found
                done += part.stop - part.start
                if progress is not None:
                    progress(done)
            finite = torch.isfinite(target).flatten(1).all(1)
            if not finite.all():
                raise PairQualityError(
                    f"{int((~finite).sum())} of {len(finite)} targets of shard {shard} are not "
                    f"finite in {settings.dtype}: check the teacher's weights, take more steps or "
                    "store float32"
                )
            if writing is not None:
                writing.result()
            writing = pool.submit(_write, folder, settings, shard, source, target, condition)
        if writing is not None:
            writing.result()


def _write(
    folder: FilePath,
    settings: PairSettings,
    shard: int,
    source: Tensor,
    target: Tensor,
    condition: dict[str, Tensor],
) -> None:
    try:
        pair_format.write_shard(folder, settings, shard, source, target, condition)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{shard_file(folder, shard)} cannot be written ({error}): finished shards are kept, "
            "make room and run the same command again",
        ) from error


def _check_arguments(
    model: FlowModel,
    solver: Any,
    batch_size: int,
    process_index: int,
    process_count: int,
    overwrite: bool,
) -> None:
    if model.shape is None:
        raise ValueError("the teacher does not know its sample shape: set shape=")
    positive("batch_size", batch_size)
    positive("process_count", process_count)
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be 0 to {process_count - 1} for {process_count} processes, got "
            f"{process_index}"
        )
    if overwrite and process_count > 1:
        raise ValueError(
            "overwrite=True would delete shards of the other processes: delete the folder first"
        )
    refuse_noise(solver, "pairs join a noise to the one sample a teacher makes of it")
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ValueError(
                f"pairs are made in float32 but the teacher's {name} is {weight.dtype}: call "
                "model.float() first"
            )


def _settings(
    model: FlowModel,
    count: int,
    solver: Any,
    steps: int | Sequence[float],
    seed: int,
    shard_size: int,
    conditions: Data | None,
    source: Data | None,
    store: str,
    dtype: torch.dtype,
    field: Any,
) -> PairSettings:
    """What decides the contents, checked."""
    positive("count", count)
    positive("shard_size", shard_size)
    if store not in STORES:
        raise unknown("store", store, STORES)
    if source is not None and store == "seed":
        raise ValueError("sources taken from data cannot be drawn from a seed: use store='noise'")
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    grid = time_grid(steps)
    if (grid[0], grid[-1]) != (0.0, 1.0):
        raise ValueError(f"the times of pairs must go from 0 to 1, got {grid[0]:g} to {grid[-1]:g}")
    assert model.shape is not None
    settings = PairSettings(
        count=count,
        shard_size=shard_size,
        shape=model.shape,
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        store=store,
        source="normal" if source is None else "data",
        solver=pair_format.describe_solver(solver),
        times=steps if isinstance(steps, int) else grid,
        path=model.path.config(),
        teacher={"sha256": identity(model), "lineage": model.lineage},
        guidance=None if field is None else describe_field(field),
    )
    first, condition = _Maker(model, field, solver, steps, settings, 1, conditions, source).given(0)
    if source is not None and tuple(first.shape[1:]) != model.shape:
        raise ValueError(
            f"sources have shape {tuple(first.shape[1:])}, the teacher takes {model.shape}"
        )
    known = {kind: name for name, (kind, _) in DTYPES.items()}
    for name, value in condition.items():
        if value.dtype not in known:
            raise ValueError(f"condition {name!r} has dtype {value.dtype}, which cannot be stored")
    model.check(first[:1], **{name: value[:1] for name, value in condition.items()})
    used = dict(condition) if source is None else {**condition, "": first}
    described = {
        "conditions": {
            name: {"dtype": known[value.dtype], "shape": list(value.shape[1:])}
            for name, value in condition.items()
        },
        "rows": _rows_digest(used, conditions, source) if used else None,
    }
    own = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return PairSettings(**{**own, **described})


def _rows_digest(used: dict[str, Tensor], *data: Data | None) -> str:
    """Tells one data set from another, by its size and its part in the first shard."""
    sizes = [len(one) if one is not None else 0 for one in data]
    return hashlib.sha256(f"{sizes} {pair_format.tensors_digest(used)}".encode()).hexdigest()


def describe_field(field: Any) -> str:
    """Name and plain parameters of a guided field, such as `APG(scale=7.5)`."""
    known = getattr(field, "description", None)
    if isinstance(known, str):
        return known
    name = getattr(field, "__qualname__", type(field).__qualname__)
    plain = (bool, int, float, str, tuple)
    values = {k: v for k, v in getattr(field, "__dict__", {}).items() if isinstance(v, plain)}
    inside = ", ".join(f"{k}={v!r}" for k, v in values.items() if not k.startswith("_"))
    return f"{name}({inside})"


def _claim(folder: FilePath, settings: PairSettings, overwrite: bool) -> None:
    """Write `store.json`, or make sure that the one there says the same."""
    if (folder / STORE).exists():
        try:
            found = pair_format.read_settings(folder)[0]
        except PairStoreError:
            if not overwrite:
                raise
            found = None
        if found is not None and found.digest() == settings.digest():
            return
        if not overwrite:
            assert found is not None
            raise RunExistsError(
                f"{folder} holds pairs made with {_difference(found, settings)}: choose another "
                "folder or overwrite"
            )
        (folder / STORE).unlink()
        for file in folder.glob("pairs-*.safetensors"):
            file.unlink()
    pair_format.write_settings(folder, settings)


def _difference(found: PairSettings, wanted: PairSettings) -> str:
    """The first setting that differs, in words."""
    a, b = found.plain(), wanted.plain()
    name = next(key for key in a if a[key] != b[key])
    if name in ("teacher", "rows"):
        return "another teacher" if name == "teacher" else "other data"
    return f"{name}={a[name]}, not {name}={b[name]}"


def _sweep(folder: FilePath, mine: Sequence[int], *, everything: bool) -> None:
    """Remove temporary files that a killed process left of the shards that are ours."""
    prefixes = [f".{shard_file(folder, shard).name}." for shard in mine]
    if everything:
        prefixes = [".pairs-", f".{STORE}."]
    for file in folder.iterdir():
        if file.name.startswith(tuple(prefixes)):
            file.unlink(missing_ok=True)


def _whole(folder: FilePath, settings: PairSettings, shard: int) -> bool:
    """Whether a shard is there and sound; a damaged one is made again."""
    try:
        pair_format.read_shard(folder, settings, shard)
    except PairStoreError:
        return False
    return True


def _finish(folder: FilePath, settings: PairSettings) -> PairStore:
    """Mark the store complete if it is: whoever writes the last shard sees all of them."""
    digests = []
    for shard in range(settings.shards):
        if not shard_file(folder, shard).exists():
            return PairStore(folder, verify=False)
        digests.append(pair_format.read_shard(folder, settings, shard, verify=False)[1]["sha256"])
    pair_format.write_settings(folder, settings, digests=digests)
    return PairStore(folder, verify=False)
