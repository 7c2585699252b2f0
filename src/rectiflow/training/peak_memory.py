"""How much memory tensors take at most while code runs, counted exactly on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Count the bytes of the tensors that are made inside the block and alive at once.

    What existed before (parameters, inputs) does not count, nor do buffers inside kernels. It
    slows every operation, so take times without it.

    Attributes:
        bytes: the most that was alive at once.

    Example:
        >>> with PeakMemory() as peak:
        ...     x = torch.ones(1000) + 1
        >>> peak.bytes
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs or {}))
            if isinstance(x, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return found

    def _add(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self._live += size
        self.bytes = max(self.bytes, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
