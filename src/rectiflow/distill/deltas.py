"""Differences of weights: carry what one model learned over to another of the same network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from rectiflow.flows.fields import FlowModel

if TYPE_CHECKING:
    from torch import Tensor


def weight_delta(custom: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning changed: `W_custom - W_base`, for weights that differ.

    Args:
        custom: the fine-tuned network, or its model.
        base: the one it was tuned from.

    Raises:
        ValueError: networks of different weights.

    Example:
        >>> one, two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = one.weight.data.fill_(3.0), two.weight.data.fill_(1.0)
        >>> weight_delta(one, two)
        {'weight': tensor([[2.]])}

    Source: arXiv 2309.06380, section 5 (weights of DreamBooth and LoRA models in InstaFlow).
    """
    new, old = _state(custom), _state(base)
    wrong = set(new) ^ set(old) or {n for n in new if new[n].shape != old[n].shape}
    if wrong:
        raise ValueError(f"the networks differ in {sorted(wrong)[0]}: they must be of one kind")
    return {
        name: new[name] - old[name]
        for name in new
        if new[name].is_floating_point() and not torch.equal(new[name], old[name])
    }


def add_delta(model: FlowModel, delta: Mapping[str, Tensor], *, scale: float = 1.0) -> FlowModel:
    """A copy of a model with `scale` times a difference added to its weights.

    Take it off again with the same difference and `scale=-1`: exact but for the rounding of the
    last digit, so keep the model where bit-identical weights matter.

    Args:
        model: the model, which is not changed.
        delta: a difference of `weight_delta` or `lora_delta`; for a model of `from_pipeline` also
            one of the diffusers networks themselves.
        scale: how much of it.

    Raises:
        ValueError: a difference of another network.
    """
    twin = copy.deepcopy(model)
    own = _state(twin)
    prefix = next((p for p in ("", "module.") if all(p + name in own for name in delta)), None)
    shapes = prefix is not None and all(
        own[prefix + name].shape == value.shape for name, value in delta.items()
    )
    if not shapes:
        raise ValueError("the difference belongs to another network: its weights do not fit")
    with torch.no_grad():
        for name, value in delta.items():
            weight = own[f"{prefix}{name}"]
            weight.add_(value.to(weight), alpha=scale)
    twin.lineage = [*model.lineage, {"method": "delta", "tensors": len(delta), "scale": scale}]
    return twin


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The weights by name; for a model, those of its network."""
    return (module.net if isinstance(module, FlowModel) else module).state_dict()
