"""How much memory tensors take at most while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made inside `run` held at one time.

    On a GPU the allocator counts; on the CPU every new storage is counted until it is freed, the
    ones that autograd keeps for going backward included.

    Args:
        run: what to watch.

    Example:
        >>> peak_bytes(lambda: torch.zeros(10) + 1)
        80
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    live = _Live()
    with live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._forget, key, storage.nbytes())
        return found

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
