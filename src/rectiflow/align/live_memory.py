"""How much memory tensors take at most while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectiflow.training.peak_memory import PeakMemory


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made inside `run` held at one time, on any device.

    Every new storage is counted until it is freed, the ones that autograd keeps for going backward
    included.

    Args:
        run: what to watch.

    Example:
        >>> import torch
        >>> peak_bytes(lambda: torch.zeros(10) + 1)
        80
    """
    with PeakMemory() as peak:
        run()
    return peak.bytes
