"""Pairs on disk: written once, read at random without loading them."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import cached_property
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rectiflow.errors import PairStoreError
from rectiflow.flows.pair_format import (
    check_noise,
    normal_sources,
    read_settings,
    read_shard,
    shard_file,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class PairStore:
    """A folder of (source, target, condition) rows that a teacher made, with random access.

    Shards are memory-mapped: opening costs no memory, and a batch reads its own rows only. When
    the store keeps seeds instead of noises, the noises of a shard are drawn when they are first
    needed; the last `cache_bytes` of them are kept, so such a store is fast only while its noises
    fit there.

    Args:
        folder: the folder that `generate_pairs` wrote.
        verify: compare the SHA-256 of every shard (about a second a gigabyte). Sizes, types and
            the store each shard belongs to are checked in any case.
        cache_bytes: memory for noises drawn from seeds.

    Attributes:
        settings: all that decided the contents.
        missing: numbers of the shards not yet generated.

    Raises:
        FileNotFoundError: no store in the folder.
        PairStoreError: a shard is truncated, changed, missing from a complete store, or made for
            other settings; or the sources are not the standard normal noise they should be.

    Example:
        >>> import tempfile
        >>> from rectiflow.distill import generate_pairs
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
        >>> folder = tempfile.mkdtemp()
        >>> store = generate_pairs(model, folder, 64, steps=1, shard_size=32)
        >>> source, target, condition = store.rows(torch.tensor([40, 3]))
        >>> bool(torch.equal(target, source + 1)), len(store), store.complete
        (True, 64, True)
    """

    def __init__(
        self, folder: str | FilePath, *, verify: bool = True, cache_bytes: int = 1 << 30
    ) -> None:
        self.folder = FilePath(folder)
        self.settings, digests = read_settings(self.folder)
        self._cache_bytes = cache_bytes
        self._drawn: OrderedDict[int, Any] = OrderedDict()
        self._shards: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.missing: list[int] = []
        for shard in range(self.settings.shards):
            if digests is None and not shard_file(self.folder, shard).exists():
                self.missing.append(shard)
                continue
            tensors, stated = read_shard(self.folder, self.settings, shard, verify=verify)
            if digests is not None and stated["sha256"] != digests[shard]:
                raise PairStoreError(
                    f"{shard_file(self.folder, shard)} is not the shard that was generated: "
                    "generate the pairs again with the same settings to remake it"
                )
            arrays = {n: x.numpy().reshape(x.shape[0], -1) for n, x in tensors.items()}
            self._shards[shard] = (arrays, stated)
        if self.complete and self.settings.source == "normal":
            self._check_sources()

    def __len__(self) -> int:
        return self.settings.count

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{len(self.missing)} shards missing"
        return f"PairStore({str(self.folder)!r}, {len(self)} pairs, {state})"

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.missing

    @property
    def digests(self) -> list[str]:
        """SHA-256 of the contents of each shard there is, in order."""
        return [stated["sha256"] for _, (_, stated) in sorted(self._shards.items())]

    def rows(
        self, indices: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b *dims"], Float[Tensor, "b *dims"], dict[str, Tensor]]:
        """Source, target and condition of the given pairs, in float32, in the order asked for.

        Raises:
            IndexError: an index outside the store.
            PairStoreError: the shard of a pair is not generated yet.
        """
        wanted = indices.to("cpu", torch.int64).numpy()
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"pairs are numbered 0 to {len(self) - 1}, got {wanted.min()} to {wanted.max()}"
            )
        # Rows of one shard are gathered by one call, then all are put in the order asked for.
        # In NumPy: a batch of 256 digits takes 0.2 ms against 0.9 ms by torch's small calls.
        numbers, offsets = np.divmod(wanted, self.settings.shard_size)
        order = np.argsort(numbers, kind="stable")
        numbers, offsets = numbers[order], offsets[order]
        touched = np.flatnonzero(np.bincount(numbers))
        starts = np.searchsorted(numbers, touched).tolist()
        stops = [*starts[1:], wanted.size]
        shards = [self._shard(int(number)) for number in touched]
        back = np.empty_like(order)
        back[order] = np.arange(wanted.size)
        found = {}
        for name, (dtype, shape) in self._columns.items():
            gathered = np.empty((wanted.size, math.prod(shape)), dtype)
            for shard, start, stop in zip(shards, starts, stops):
                # Indices were checked above; "clip" spares NumPy a buffered copy.
                shard[name].take(offsets[start:stop], 0, gathered[start:stop], "clip")
            found[name] = torch.from_numpy(gathered.take(back, 0)).view(wanted.size, *shape)
        source, target = found.pop("source"), found.pop("target").float()
        return source, target, {n.removeprefix("condition."): v for n, v in found.items()}

    @cached_property
    def _columns(self) -> dict[str, tuple[Any, list[int]]]:
        """The NumPy type and the shape of one row of each tensor."""
        settings, shape = self.settings, list(self.settings.shape)
        found = {"source": (np.float32, shape), "target": (np.dtype(settings.dtype), shape)}
        for name, row in settings.conditions.items():
            found[f"condition.{name}"] = (np.dtype(row["dtype"]), list(row["shape"]))
        return found

    def _shard(self, shard: int) -> dict[str, Any]:
        """The arrays of a shard, one row a pair, the source drawn if need be."""
        if shard not in self._shards:
            raise PairStoreError(
                f"{self.folder} lacks {len(self.missing)} of {self.settings.shards} shards: "
                "generate the pairs again with the same settings to finish it"
            )
        arrays, stated = self._shards[shard]
        if self.settings.store == "noise":
            return arrays
        if shard not in self._drawn:
            drawn = normal_sources(self.settings, shard)
            check_noise(shard_file(self.folder, shard), drawn, stated)
            self._drawn[shard] = drawn.numpy().reshape(drawn.shape[0], -1)
            each = self._drawn[shard].nbytes
            while len(self._drawn) > 1 and len(self._drawn) * each > self._cache_bytes:
                self._drawn.popitem(last=False)
        self._drawn.move_to_end(shard)
        return {**arrays, "source": self._drawn[shard]}

    def _check_sources(self) -> None:
        """Refuse stored sources that are not standard normal, such as targets under their name."""
        if self.settings.store != "noise":
            return
        probe = torch.linspace(0, len(self) - 1, min(len(self), 1024)).long()
        x = self.rows(probe)[0].flatten(1)
        # Six standard errors of the mean and the standard deviation of normal numbers, and a
        # hundredth for rounding: a false alarm is rarer than one store in 10^6, while data whose
        # mean or spread differs by a few per cent is found.
        margin = 6 / math.sqrt(x.numel()) + 0.01
        mean, std = float(x.mean()), float((x - x.mean()).square().mean().sqrt())
        wrong = not (abs(mean) <= margin and abs(std - 1) <= margin)
        if not wrong and x.shape[0] >= 64:
            # Whole-tensor moments miss standardised data; its single dimensions give it away.
            spread = x.std(0)
            wrong = float((spread - 1).abs().max()) > 8 / math.sqrt(2 * x.shape[0])
        if wrong:
            raise PairStoreError(
                f"the sources in {self.folder} have mean {mean:.3f} and standard deviation "
                f"{std:.3f}, not those of standard normal noise: source and target look swapped"
            )
