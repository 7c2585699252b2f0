"""The files of a pair store: `store.json` and the shards `pairs-00000.safetensors`, ...

Every shard is a function of the settings and its own number, so any shard can be made alone, by
any process, in any order. A shard carries the digest of the settings and of its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from rectiflow import __version__
from rectiflow.errors import PairStoreError, unknown
from rectiflow.files import atomic_path, read_json, write_json
from rectiflow.flows import solvers
from rectiflow.flows.adaptive import DormandPrince

if TYPE_CHECKING:
    from jaxtyping import Float

FORMAT = 1
STORE = "store.json"
DTYPES = {
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
    "float64": (torch.float64, "F64"),
    "bool": (torch.bool, "BOOL"),
    "uint8": (torch.uint8, "U8"),
    "int32": (torch.int32, "I32"),
    "int64": (torch.int64, "I64"),
}


@dataclass(frozen=True)
class PairSettings:
    """All that decides the contents of a store.

    Attributes:
        count: number of pairs.
        shard_size: pairs in a shard; the last one may hold fewer.
        shape: shape of one sample.
        dtype: how targets are stored; sources are float32.
        seed: seed of the noises and of the order of conditions.
        store: "noise" when sources are stored, "seed" when they are drawn anew.
        source: "normal" for noise, "data" for samples of a data set, "inverted" for the noises that
            a flow assigns to given targets.
        solver: name and parameters of the solver.
        times: number of steps, or the grid of times.
        path: configuration of the teacher's path.
        conditions: dtype and shape of one row, by name.
        rows: SHA-256 of the first shard's conditions and data sources; None without them.
        teacher: SHA-256 of the weights and the lineage.
        guidance: what stood between the teacher and the solver; None for the teacher itself.
    """

    count: int
    shard_size: int
    shape: Sequence[int]
    dtype: str = "float32"
    seed: int = 0
    store: str = "noise"
    source: str = "normal"
    solver: Mapping[str, Any] = field(default_factory=lambda: {"name": "euler"})
    times: int | Sequence[float] = 100
    path: Mapping[str, Any] = field(default_factory=lambda: {"name": "rectified"})
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: str | None = None
    teacher: Mapping[str, Any] = field(default_factory=lambda: {"sha256": None, "lineage": []})
    guidance: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON would return it."""
        return json.loads(json.dumps(asdict(self), sort_keys=True))

    def digest(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def rows_of(self, shard: int) -> int:
        """Number of pairs in a shard."""
        return min(self.shard_size, self.count - shard * self.shard_size)

    def layout(self, shard: int) -> dict[str, tuple[str, list[int]]]:
        """The safetensors type and shape of each tensor of a shard."""
        rows = self.rows_of(shard)
        found = {"target": (DTYPES[self.dtype][1], [rows, *self.shape])}
        if self.store == "noise":
            found["source"] = ("F32", [rows, *self.shape])
        for name, row in self.conditions.items():
            found[f"condition.{name}"] = (DTYPES[row["dtype"]][1], [rows, *row["shape"]])
        return found


def shard_file(folder: FilePath, shard: int) -> FilePath:
    """Where a shard lies."""
    return folder / f"pairs-{shard:05d}.safetensors"


def write_settings(
    folder: FilePath, settings: PairSettings, *, digests: Sequence[str] | None = None
) -> None:
    """Write `store.json`; with the digests of all shards it is marked complete."""
    write_json(
        folder / STORE,
        {
            "format": FORMAT,
            "rectiflow": __version__,
            "complete": digests is not None,
            "settings": settings.plain(),
            "digests": list(digests or ()),
        },
    )


def read_settings(folder: FilePath) -> tuple[PairSettings, list[str] | None]:
    """The settings of a store, and the digests of its shards once it is complete.

    Raises:
        FileNotFoundError: no store there.
        PairStoreError: `store.json` is damaged or of a later format.
    """
    file = folder / STORE
    if not file.is_file():
        raise FileNotFoundError(f"no pairs in {folder} (looked for {STORE}): generate them first")
    try:
        value = read_json(file)
        version, given = value["format"], dict(value["settings"])
        if version > FORMAT:
            raise PairStoreError(
                f"{file} has format {version}, this version reads up to {FORMAT}: update rectiflow"
            )
        if set(given) != {f.name for f in fields(PairSettings)}:
            raise KeyError("settings")
        settings = PairSettings(**given)
        if settings.count < 1 or settings.shard_size < 1:
            raise ValueError("count")
        settings.layout(0)
        digests = list(value["digests"]) if value["complete"] else None
        if digests is not None and len(digests) != settings.shards:
            raise ValueError("digests")
    except PairStoreError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise PairStoreError(
            f"{file} does not describe a pair store ({error}): restore it or make the pairs anew"
        ) from None
    return settings, digests


def normal_sources(settings: PairSettings, shard: int) -> Float[Tensor, "rows *shape"]:
    """The noises of a shard, drawn from a generator seeded by the store's seed and its number."""
    # Odd 64-bit constants keep neighbouring seeds and shards far apart, and apart from the
    # training's own draws.
    mixed = (settings.seed * 0xA24BAED4963EE407 + shard * 0x9FB21C651E98DF25 + 7) % (1 << 63)
    generator = torch.Generator().manual_seed(mixed)
    return torch.randn(settings.rows_of(shard), *settings.shape, generator=generator)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_shard(
    folder: FilePath,
    settings: PairSettings,
    shard: int,
    source: Float[Tensor, "rows *shape"],
    target: Float[Tensor, "rows *shape"],
    condition: Mapping[str, Tensor],
) -> None:
    """Write one shard: afterwards it is there as a whole, or not at all."""
    tensors = {"target": target.to(DTYPES[settings.dtype][0])}
    if settings.store == "noise":
        tensors["source"] = source
    tensors |= {f"condition.{name}": value for name, value in condition.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    stated = {
        "settings": settings.digest(),
        "shard": shard,
        "sha256": tensors_digest(tensors),
        "noise": _probe(source),
    }
    with atomic_path(shard_file(folder, shard)) as temporary:
        # One key: several would be written in no fixed order, and equal shards would differ.
        # Not save_file: its own temporary file would stay behind when the process is killed.
        temporary.write_bytes(to_bytes(tensors, metadata={"rectiflow": json.dumps(stated)}))


def read_shard(
    folder: FilePath, settings: PairSettings, shard: int, *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Map a shard into memory and check it against the settings.

    Args:
        folder: the store.
        settings: its settings.
        shard: number of the shard.
        verify: also compare the SHA-256 of the contents.

    Returns:
        the tensors, read from the disk as they are touched, and what the shard states of itself.

    Raises:
        PairStoreError: the shard is missing, truncated, changed or of another store.
    """
    file = shard_file(folder, shard)
    remedy = "generate the pairs again with the same settings to remake it"
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                raise ValueError("truncated header")
            header = json.loads(stream.read(length))
        stated = json.loads(header.pop("__metadata__")["rectiflow"])
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
        settings_digest, number, sha256 = stated["settings"], stated["shard"], stated["sha256"]
        stated["noise"] = [float(x) for x in stated["noise"]]
    except FileNotFoundError:
        raise PairStoreError(f"{file} is missing: {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PairStoreError(f"{file} is not a shard of pairs ({error}): {remedy}") from None
    if settings_digest != settings.digest() or number != shard:
        raise PairStoreError(f"{file} belongs to other pairs than {STORE} describes: {remedy}")
    if found != settings.layout(shard):
        raise PairStoreError(f"{file} does not hold the tensors {STORE} describes: {remedy}")
    if size != 8 + length + max(stop for _, stop in spans.values()):
        raise PairStoreError(f"{file} has {size} bytes, not those of its header: {remedy}")
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    kinds = {code: dtype for dtype, code in DTYPES.values()}
    tensors = {}
    for name, (code, shape) in found.items():
        dtype = kinds[code]
        offset, wrong = divmod(8 + length + spans[name][0], dtype.itemsize)
        if wrong:
            raise PairStoreError(f"{file} holds {name!r} unaligned: {remedy}")
        tensors[name] = torch.empty(0, dtype=dtype).set_(storage, offset, shape)
    if verify and tensors_digest(tensors) != sha256:
        raise PairStoreError(f"{file} was changed (its SHA-256 differs): {remedy}")
    return tensors, stated


def check_noise(file: FilePath, source: Tensor, stated: Mapping[str, Any]) -> None:
    """Refuse noises that this version of torch draws differently from the one that wrote them."""
    # Another processor may round the last digits differently; another generator differs wholly.
    if any(abs(a - b) > 1e-4 for a, b in zip(_probe(source), stated["noise"])):
        raise PairStoreError(
            f"the noises of {file} cannot be drawn again from their seed with torch "
            f"{torch.__version__}: generate the pairs anew"
        )


def _probe(source: Tensor) -> list[float]:
    """A few values that tell one sequence of random numbers from another."""
    flat = source.reshape(-1)
    return [float(x) for x in (*flat[:3], *flat[-3:])]


def describe_solver(solver: Any) -> dict[str, Any]:
    """Name and parameters of a solver, as plain values."""
    solver = solvers.resolve(solver)
    for name in solvers.names():
        # The tolerances of dopri5 are written out, whatever its defaults become.
        if name != "dopri5" and solver == solvers.resolve(name):
            return {"name": name}
    if (spec := getattr(solver, "spec", None)) is not None:
        return {"name": spec}
    if not is_dataclass(solver) or isinstance(solver, type):
        return {"name": type(solver).__qualname__}
    name = "dopri5" if isinstance(solver, DormandPrince) else type(solver).__qualname__
    return {"name": name, **json.loads(json.dumps(asdict(solver)))}


def solver_of(description: Mapping[str, Any]) -> Any:
    """The solver of a description.

    Raises:
        ValueError: it describes a solver that rectiflow does not know.
    """
    values = dict(description)
    name = values.pop("name")
    if name == "dopri5":
        return DormandPrince(**values)
    if name == "RungeKutta":
        values["matrix"] = tuple(tuple(row) for row in values["matrix"])
        values |= {key: tuple(values[key]) for key in ("nodes", "weights")}
        return solvers.RungeKutta(**values)
    if values or name.partition(":")[0] not in solvers.names():
        raise unknown("solver", name, solvers.names())
    return solvers.resolve(name)
