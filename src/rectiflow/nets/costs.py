"""What a network costs: parameters and multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Cost:
    """The size of a network.

    Attributes:
        parameters: number of parameters.
        macs: multiply-adds of one forward pass on one sample.
        convolutions: the part of them in convolutions. Counters that hook layers see little
            else of a U-Net, so this is what many papers state.
    """

    parameters: int
    macs: int
    convolutions: int


def cost(net: nn.Module, shape: Sequence[int] | None = None, **condition: Any) -> Cost:
    """Count parameters and multiply-adds without computing anything.

    A copy on the meta device is run once under torch's counter of operations, which sees matrix
    products, convolutions and attention, and none of the elementwise work.

    Args:
        net: the network `net(x, t, **condition)`.
        shape: the shape of one sample; the net's own by default.
        condition: given to the network, one row.

    Raises:
        ValueError: no shape is given and the net has none.

    Example:
        >>> from rectiflow.nets import build
        >>> cost(build("mlp", shape=(2,), width=8, depth=1, time_features=4)).macs
        208
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = shape if shape is not None else getattr(net, "shape", None)
    if shape is None:
        raise ValueError("the network does not know the shape of its samples: give shape=")
    twin = copy.deepcopy(net).to("meta")
    x, t = torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta")
    rows = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in condition.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(x, t, **rows)
    # The counter takes a multiply-add for two operations.
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(n for kind, n in counts.items() if "convolution" in str(kind))
    return Cost(
        parameters=sum(p.numel() for p in net.parameters()),
        macs=counter.get_total_flops() // 2,
        convolutions=convolutions // 2,
    )


def macs(net: nn.Module, shape: Sequence[int] | None = None, **condition: Any) -> int:
    """Multiply-adds of one forward pass on one sample; see `cost`."""
    return cost(net, shape, **condition).macs
