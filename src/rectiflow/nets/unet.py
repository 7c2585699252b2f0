"""A U-Net for images, after DDPM++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from rectiflow import errors
from rectiflow.nets.base import Net
from rectiflow.nets.blocks import ResidualBlock, SelfAttention, conv, group_norm, linear
from rectiflow.nets.embeddings import LabelEmbedding, TimeEmbedding

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class UNet(Net):
    """Residual blocks on maps that shrink by halves and grow back, with skips across.

    The network of the rectified flow paper for images; `nets.sizes` names ready-made sizes.
    Each level but the last halves the map, so the sides must be multiples of
    patch * 2^(levels - 1): 28 goes 28, 14, 7 with three levels. The smallest map always
    attends to itself. The time embedding is added inside each block, as in DDPM++.

    Both memory layouts work. Measure before choosing channels_last on a CPU: convolutions gain by
    it and group norm loses.

    Args:
        shape: (channels, height, width) of one image.
        width: channels at the first level.
        multipliers: channels of each level as multiples of `width`.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention: map sizes (the longer side) at which blocks also attend, for instance (16,).
        heads: attention heads.
        dropout: probability inside the blocks while training.
        patch: work on patches of this side folded into channels. 2 makes the whole net about
            four times cheaper, at some loss of detail.
        classes: number of class labels, 0 for an unconditional net.

    Raises:
        ValueError: sides that cannot be halved often enough, an attention size that no level
            has, sizes that are not positive.

    Example:
        >>> net = UNet(shape=(1, 28, 28), width=8, multipliers=(1, 2, 2), blocks=1, attention=())
        >>> net(torch.randn(2, 1, 28, 28), torch.rand(2)).shape
        torch.Size([2, 1, 28, 28])

    Source:
        Song et al. 2021 (2011.13456) DDPM++; Liu et al. 2023 (2209.03003), appendix. The
        up-sampling is nearest and the down-sampling a 2x2 mean. `patch` is ours.
    """

    name: ClassVar[str] = "unet"

    def __init__(
        self,
        *,
        shape: Sequence[int],
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        heads: int = 1,
        dropout: float = 0.15,
        patch: int = 1,
        classes: int = 0,
    ) -> None:
        super().__init__(
            shape=shape,
            width=width,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention=tuple(attention),
            heads=heads,
            dropout=dropout,
            patch=patch,
            classes=classes,
        )
        for key, value in {"width": width, "blocks": blocks, "heads": heads}.items():
            errors.positive(key, value)
        _check_sides(self.shape, multipliers, attention, patch)
        colours = self.shape[0] * patch**2
        channels = [width * m for m in multipliers]
        self.patch = patch
        self.time = TimeEmbedding(width)
        self.time_in = linear(width, 4 * width)
        self.time_out = linear(4 * width, 4 * width)
        self.label = LabelEmbedding(classes, 4 * width) if classes else None
        self.stem = conv(colours, width, 3)

        side = max(self.shape[1:]) // patch
        kept = [width]  # channels of the maps that cross over
        now = width
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()

        def layer(inputs: int, outputs: int, change: str | None, attend: bool) -> _Layer:
            block = ResidualBlock(inputs, outputs, 4 * width, dropout=dropout, change=change)
            return _Layer(block, SelfAttention(outputs, heads=heads) if attend else None)

        for level, wide in enumerate(channels):
            if level:
                self.down.append(layer(now, now, "down", False))
                kept.append(now)
            for _ in range(blocks):
                self.down.append(layer(now, wide, None, side >> level in attention))
                now = wide
                kept.append(now)
        self.middle = nn.ModuleList([layer(now, now, None, True), layer(now, now, None, False)])
        for level in reversed(range(len(channels))):
            wide = channels[level]
            for index in range(blocks + 1):
                attend = index == blocks and side >> level in attention
                self.up.append(layer(now + kept.pop(), wide, None, attend))
                now = wide
            if level:
                self.up.append(layer(now, now, "up", False))
        self.norm = group_norm(now)
        self.head = conv(now, colours, 3, zero=True)

    def forward(
        self,
        x: Float[Tensor, "batch c h w"],
        t: Float[Tensor, "batch"],
        *,
        label: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        e = self.time_out(F.silu(self.time_in(self.time(t).to(x.dtype))))
        if self.label is not None:
            e = e + self.label(label)
        e = F.silu(e)
        h = self.stem(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        kept = [h]
        for layer in self.down:
            h = layer(h, e)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, e)
        for layer in self.up:
            h = layer(h if layer.block.change else torch.cat([h, kept.pop()], dim=1), e)
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h


class _Layer(nn.Module):
    """A residual block and, at some map sizes, attention after it."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.block(x, e)
        return h if self.attention is None else self.attention(h)


def _check_sides(
    shape: tuple[int, ...], multipliers: Sequence[int], attention: Sequence[int], patch: int
) -> None:
    if len(shape) != 3:
        raise ValueError(f"unet takes shape (channels, height, width), got {shape}")
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers must list numbers >= 1, got {tuple(multipliers)}")
    errors.positive("patch", patch)
    multiple = patch * 2 ** (len(multipliers) - 1)
    if shape[1] % multiple or shape[2] % multiple:
        raise ValueError(
            f"a unet with {len(multipliers)} levels and patch {patch} takes heights and widths "
            f"that are multiples of {multiple}, got {shape[1]}x{shape[2]}: "
            "resize or pad the images, or use fewer multipliers"
        )
    sides = [max(shape[1:]) // patch >> level for level in range(len(multipliers))]
    missing = [size for size in attention if size not in sides]
    if missing:
        raise ValueError(
            f"attention={tuple(attention)} names a map size this unet does not have "
            f"(it has {', '.join(map(str, sides))})"
        )
