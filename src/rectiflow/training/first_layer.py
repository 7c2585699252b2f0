"""TrAct in a training: which layer it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rectiflow.errors import unknown
from rectiflow.flows.couplings import Draw
from rectiflow.optim.layer_search import first_layer
from rectiflow.optim.tract_layers import apply_tract
from rectiflow.training.method import Method, Phase


def train_first_layer(
    method: Method,
    phases: Sequence[Phase],
    lam: float,
    draw: Draw,
    *,
    layer: str | None = None,
    gram: str = "local",
) -> str:
    """Let TrAct train the layer of the model's network that sees the data first, in place.

    Damping counts in units of the inputs' mean square, as noised images change it with time.

    Args:
        method: whose model it is.
        phases: its phases; the loss of the first that trains the model shows the layer.
        lam: damping.
        draw: a small draw for that.
        layer: path in the network of another layer to take.
        gram: whose inputs' second moment is taken, see `TrActSettings`.

    Returns:
        the path of the layer in the network.

    Raises:
        ValueError: no such layer, one of another kind, or one that is not trained.
    """
    net: Any = method.model.net
    own = {id(p) for p in method.model.parameters()}
    losses = [p.loss for p in phases if any(id(w) in own for w in p.module.parameters())]
    if not isinstance(net, nn.Module) or not losses:
        raise ValueError("TrAct trains the first layer of a network, and this model trains none")
    path = layer
    if path is None:
        with torch.random.fork_rng(devices=[]):
            path = first_layer(net, lambda: losses[0](draw))
    if path not in dict(net.named_modules()):
        raise unknown("layer", path, [name for name, _ in net.named_modules() if name])
    if not all(p.requires_grad for p in net.get_submodule(path).parameters()):
        raise ValueError(
            f"TrAct trains layers, and the weights of {path!r} are frozen: leave it out"
        )
    return apply_tract(net, lam, layer=path, relative=True, gram=gram)
