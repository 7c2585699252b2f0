"""A residual multilayer perceptron for points, digits and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from rectiflow import errors
from rectiflow.nets.base import Net
from rectiflow.nets.embeddings import LabelEmbedding, TimeEmbedding

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(Net):
    """Residual blocks of two linear layers on the flattened sample.

    Use it where samples are short vectors: points in the plane, 8x8 digits, features. With e
    the embedding of the time plus that of the label, a block maps
    h to h + B phi(A h + C e). The products C e of all blocks are one matrix product on a
    short embedding, so that time costs little beside the body.

    Args:
        shape: the shape of one sample.
        width: hidden width.
        depth: number of residual blocks.
        classes: number of class labels, 0 for an unconditional net.
        time_features: length of the embedding, even and at least 4.
        activation: `silu`, `gelu`, `relu` or `tanh`.
        dropout: probability of dropping a hidden unit in a block while training.
        zero: start as the zero function, the output layer filled with zeros.

    Raises:
        ValueError: a size that is not positive, an unknown activation.

    Example:
        >>> import torch
        >>> net = MLP(shape=(1, 8, 8), width=32, depth=2, classes=10)
        >>> net(torch.randn(3, 1, 8, 8), torch.rand(3), label=torch.tensor([0, 4, 10])).shape
        torch.Size([3, 1, 8, 8])
    """

    name: ClassVar[str] = "mlp"

    def __init__(
        self,
        *,
        shape: Sequence[int],
        width: int = 512,
        depth: int = 4,
        classes: int = 0,
        time_features: int = 64,
        activation: str = "silu",
        dropout: float = 0.0,
        zero: bool = True,
    ) -> None:
        super().__init__(
            shape=shape,
            width=width,
            depth=depth,
            classes=classes,
            time_features=time_features,
            activation=activation,
            dropout=dropout,
            zero=zero,
        )
        errors.positive("width", width)
        errors.positive("depth", depth)
        if activation not in ACTIVATIONS:
            raise errors.unknown("activation", activation, ACTIVATIONS)
        size = 1
        for side in self.shape:
            size *= side
        phi = ACTIVATIONS[activation]
        self.width = width
        self.time = TimeEmbedding(time_features)
        self.time_in = nn.Linear(time_features, time_features)
        self.label = LabelEmbedding(classes, time_features) if classes else None
        self.phi = phi()
        self.shift = nn.Linear(time_features, depth * width)
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, phi(), dropout) for _ in range(depth))
        self.head = nn.Linear(width, size)
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Float[Tensor, "batch *dims"],
        t: Float[Tensor, "batch"],
        *,
        label: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch *dims"]:
        e = self.time_in(self.time(t).to(x.dtype))
        if self.label is not None:
            e = e + self.label(label)
        shifts = self.shift(self.phi(e)).split(self.width, dim=1)
        h = self.stem(x.flatten(1))
        for block, shift in zip(self.blocks, shifts):
            h = block(h, shift)
        return self.head(h).view_as(x)


class _Block(nn.Module):
    def __init__(self, width: int, phi: nn.Module, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)  # its bias is in the shift
        self.phi = phi
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, shift: Tensor) -> Tensor:
        return h + self.outer(self.dropout(self.phi(self.inner(h) + shift)))
