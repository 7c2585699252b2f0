"""Adapters of aligned models: first weights, and models between and beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rectiflow.distill.deltas import add_delta, weight_delta
from rectiflow.distill.lora import AdaptedNet, lora_delta, merge_lora, with_lora
from rectiflow.errors import positive
from rectiflow.flows.fields import FlowModel


def gaussian_lora(
    model: FlowModel,
    rank: int = 4,
    targets: Sequence[str] | None = None,
    *,
    alpha: float | None = None,
    seed: int = 0,
) -> FlowModel:
    """A copy of a model with fresh adapters in single precision, `A ~ N(0, 1/rank²)` and `B = 0`.

    It makes exactly the model's samples until it is trained. Adapters of embeddings keep peft's
    first weights, where A is 0 and B is not.

    Args:
        model: the model; it is not changed.
        rank: rank of the adapters.
        targets: names, or endings of names, of the layers that get one; projections of attention
            by default, or all linear layers of a network without them.
        alpha: the adapters count `alpha / rank` times; once by default.
        seed: of the first weights.

    Source: arXiv 2310.03739, section 4.2, with peft's "gaussian" first weights.
    """
    thin = with_lora(model, rank, targets, alpha=alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in thin.named_parameters():
            if not weight.requires_grad:
                continue
            # Half-precision adapters lose small updates and stop gradient scalers.
            weight.data = weight.data.float()
            if "lora_A" in name:
                fresh = torch.randn(weight.shape, generator=generator) / rank
                weight.copy_(fresh)
    return thin


def mix_adapters(
    base: FlowModel, models: Sequence[FlowModel], weights: Sequence[float]
) -> FlowModel:
    """The base with a weighted sum of what several aligned models added to it, as a plain model.

    One model and a weight in [0, 1] trades what the base does against the reward; two models and
    weights `1 - a, a` go from one reward to the other. The products `B A` are interpolated, not
    the factors: the mixture is linear in the weights, exact at its ends, and takes adapters of
    different ranks.

    Args:
        base: the model that all were aligned from; it is not changed.
        models: models with adapters, or plain models of the same network.
        weights: one each; 0 leaves a model out.

    Returns:
        a plain model; its lineage names the mixture.

    Raises:
        ValueError: no model, weights that do not match, or a model of another network.

    Example:
        >>> from rectiflow.nets import MLP
        >>> base = FlowModel(MLP(shape=(2,), width=8, depth=1), shape=(2,))
        >>> mix_adapters(base, [gaussian_lora(base, 2)], [0.5]).lineage[-1]["weights"]
        [0.5]

    Source: arXiv 2310.03739, section 5 (interpolation of adapters).
    """
    if not models or len(models) != len(weights):
        raise ValueError(
            f"give one weight a model, got {len(weights)} weights for {len(models)} models"
        )
    mixed = base
    for model, weight in zip(models, weights):
        adapted = isinstance(model.net, AdaptedNet)
        delta = lora_delta(model) if adapted else weight_delta(model, base)
        if weight and delta:
            mixed = add_delta(mixed, delta, scale=float(weight))
    if mixed is base:
        mixed = add_delta(base, {})
    entry: dict[str, Any] = {"method": "adapter-mix", "weights": [float(w) for w in weights]}
    mixed.lineage = [*base.lineage, entry]
    return mixed


def scale_adapter(base: FlowModel, model: FlowModel, scale: float) -> FlowModel:
    """The base with an aligned model's adapters counted `scale` times; 0 is the base itself.

    Raises:
        ValueError: a negative scale, or a model of another network.
    """
    positive("scale", scale, zero=True)
    return mix_adapters(base, [model], [scale])


def merged(model: FlowModel) -> FlowModel:
    """The model without adapters: what they learned is added to the weights."""
    return merge_lora(model) if isinstance(model.net, AdaptedNet) else model
