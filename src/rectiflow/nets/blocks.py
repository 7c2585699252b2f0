"""The parts of the U-Net: residual blocks, self-attention, initialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# A sum of two unit-variance branches keeps unit variance.
RESCALE = 0.5**0.5


def conv(inputs: int, outputs: int, kernel: int, *, zero: bool = False) -> nn.Conv2d:
    """A same-size convolution, Glorot-uniform or zero weights, zero bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    _fill(layer, zero=zero)
    return layer


def linear(inputs: int, outputs: int, *, zero: bool = False) -> nn.Linear:
    """A linear layer, Glorot-uniform or zero weights, zero bias."""
    layer = nn.Linear(inputs, outputs)
    _fill(layer, zero=zero)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels each, as many as divide the channels."""
    most = max(1, min(32, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def resample(x: Float[Tensor, "batch c h w"], change: str | None) -> Float[Tensor, "batch c i j"]:
    """Double (`up`, nearest) or halve (`down`, mean of 2x2) the sides, or leave them."""
    if change == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x, 2) if change == "down" else x


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding added between them, beside a skip.

    h = conv(silu(norm(x))) + W e; h = conv(dropout(silu(norm(h)))); the result is
    (skip(x) + h) / sqrt(2). Resampling happens inside, on both branches. The embedding is
    added rather than used to scale the norm: that is what DDPM++ does, and on a CPU it saves a
    pass over the activations per block.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        embedding: length of the embedding e, to which the activation was already applied.
        dropout: probability while training.
        change: `"up"`, `"down"` or None.

    Example:
        >>> import torch
        >>> block = ResidualBlock(8, 16, 32, change="down")
        >>> block(torch.randn(2, 8, 6, 6), torch.randn(2, 32)).shape
        torch.Size([2, 16, 3, 3])

    Source:
        Song et al. 2021 (2011.13456), the DDPM++ blocks, after BigGAN's.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        dropout: float = 0.0,
        change: str | None = None,
    ) -> None:
        super().__init__()
        self.change = change
        self.norm1 = group_norm(inputs)
        self.conv1 = conv(inputs, outputs, 3)
        self.shift = linear(embedding, outputs)
        self.norm2 = group_norm(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv(outputs, outputs, 3, zero=True)
        plain = inputs == outputs and change is None
        self.skip = nn.Identity() if plain else conv(inputs, outputs, 1)

    def forward(
        self, x: Float[Tensor, "batch c h w"], e: Float[Tensor, "batch embedding"]
    ) -> Float[Tensor, "batch d i j"]:
        h = self.conv1(resample(F.silu(self.norm1(x)), self.change))
        h = h + self.shift(e)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.skip(resample(x, self.change)) + h) * RESCALE


class SelfAttention(nn.Module):
    """Every place of the map attends to every other, beside a skip.

    With tokens z = norm(x), the result is (x + W softmax(q k^T / sqrt(d)) v) / sqrt(2), where
    q, k, v are linear in z and d is the width of a head.

    Args:
        channels: width, a multiple of `heads`.
        heads: number of heads.

    Example:
        >>> import torch
        >>> SelfAttention(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, *, heads: int = 1) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"attention over {channels} channels needs heads that divide them, got {heads}"
            )
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = linear(channels, 3 * channels)
        self.out = linear(channels, channels, zero=True)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        parts = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        y = self.out(mixed.transpose(1, 2).flatten(2))
        return (x + y.transpose(1, 2).unflatten(2, x.shape[2:])) * RESCALE


def _fill(layer: nn.Conv2d | nn.Linear, *, zero: bool) -> None:
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
