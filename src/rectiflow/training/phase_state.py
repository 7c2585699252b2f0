"""What a checkpoint keeps of a phase: its weights and its optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def phase_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Weights and optimizer state, whole and on the CPU, by the names of the weights."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=device.type != "cpu")
    if _keeps_buffers(optimizer):
        weights, moments = get_state_dict(module, optimizer, options=options)
    else:
        # A phase that has not run yet, whose optimizer would take a first step to be read; or an
        # optimizer that keeps numbers alone, for which torch finds no device.
        weights = get_model_state_dict(module, options=options)
        moments = optimizer.state_dict() if optimizer.state else None
    return {"module": weights, "optimizer": moments}


def restore_phase(
    module: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    """Load what `phase_state` gave."""
    weights, moments = saved["module"], saved["optimizer"]
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    if moments is None:
        return
    # Buffers are kept by the names of their weights, numbers alone by the weights' places.
    if isinstance(moments["param_groups"][0]["params"][0], int):
        optimizer.load_state_dict(moments)
        return
    # A weight that no loss uses has no state.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(module, optimizer, moments, options=options)


def _keeps_buffers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is more in an optimizer's state than single numbers."""
    values = (v for state in optimizer.state.values() for v in state.values())
    return any(torch.is_tensor(value) and value.ndim > 0 for value in values)
