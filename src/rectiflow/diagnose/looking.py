"""Looking at a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from rectiflow.optim.tract_layers import plain_gradients
from rectiflow.training.random_state import random_state, set_random_state


@contextmanager
def untouched(module: nn.Module | None = None, *, batch_statistics: bool = False) -> Iterator[None]:
    """Let a block differentiate a model twice, and leave the model exactly as it was.

    Inside, modules are in evaluation mode, attention takes the kernel that has a second derivative,
    autocast is off, compiled networks run uncompiled and TrAct layers have plain gradients.
    Afterwards each module's mode, buffers (running statistics) and torch's random numbers are what
    they were.

    Args:
        module: what is looked at; without one only what is global is taken care of.
        batch_statistics: let batch normalisation use the statistics of the batch, as in training.
            Dropout stays off.
    """
    modules = [] if module is None else list(module.modules())
    first = None if module is None else next(iter(module.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    with ExitStack() as stack:
        stack.callback(set_random_state, random_state(device), device)
        if module is not None:
            stack.enter_context(plain_gradients(module))
        for part in modules:
            norm = batch_statistics and isinstance(part, _NormBase)
            stack.callback(setattr, part, "training", part.training)
            part.training = norm
            if norm:
                stack.callback(setattr, part, "track_running_stats", part.track_running_stats)
                part.track_running_stats = False
            for name, buffer in part.named_buffers(recurse=False):
                stack.callback(_put_back, part, name, buffer, buffer.clone())
        if any(map(_compiled, modules)) and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        yield


def _put_back(module: nn.Module, name: str, buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Undo changes of a buffer; writing to one without need would spoil graphs that saved it."""
    if not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)
    if getattr(module, name) is not buffer:
        setattr(module, name, buffer)


def _compiled(module: Any) -> bool:
    """Whether `torch.compile` has been there: twice differentiable it is not."""
    inner = getattr(module, "_compiled_call_impl", None)
    return inner is not None or type(module).__name__ == "OptimizedModule"
