"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class EMA:
    """An average that follows a module's parameters; buffers are copied.

    The decay warms up as `min(decay, (1 + n) / (10 + n))` over updates n, so that the average is
    useful from the start and a short run does not keep its first weights.

    Args:
        module: what to follow.
        decay: the final decay; 0.9999 averages over about 10,000 updates.
        warmup: whether the decay warms up.

    Source: warm-up of the official code of arXiv 2209.03003.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        # The parameters themselves: optimizers and devices may exchange the memory behind them.
        self._live = list(module.parameters())
        self._average = [p.detach().clone() for p in self._live]
        self._names = [name for name, _ in module.named_parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the module's present weights."""
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(self._average, self._live, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor | int]:
        """The averaged parameters by name, and the number of updates under `updates`."""
        return {**dict(zip(self._names, self._average)), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Take over a saved average."""
        for name, own in zip(self._names, self._average):
            own.copy_(state[name])
        self.updates = int(state["updates"])

    @torch.no_grad()
    def averaged(self, module: Module) -> Module:
        """A copy of the module that holds the averaged weights."""
        twin = copy.deepcopy(module)
        for own, average in zip(twin.parameters(), self._average):
            own.copy_(average)
        return twin
