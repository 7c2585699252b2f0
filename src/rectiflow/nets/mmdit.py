"""MMDiT: a transformer over image patches and context tokens, the network of Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from rectiflow import errors
from rectiflow.nets.base import Net
from rectiflow.nets.blocks import linear
from rectiflow.nets.embeddings import LabelEmbedding
from rectiflow.nets.joint_blocks import QK_NORMS, JointBlock, modulated, normalized
from rectiflow.nets.positions import axis_table, crop_positions, noise_features

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

TIME_FEATURES = 256


class MMDiT(Net):
    """Image patches and context tokens in two streams that attend to each other in every block.

    For images or latents with any condition: a class `label` becomes one learned token, `context`
    is any sequence of token embeddings (text encoders, precomputed), and `pooled` one vector that
    joins the time in modulating every layer. Without conditions one learned token stands in. A
    table of positions larger than the training image lets one network take several resolutions
    and aspect ratios: any sides that are multiples of `patch`, up to `max_size` patches.

    The network is handed our t (1 is data) and reads 1000 (1 - t), the noise level in
    thousandths. `rectiflow.interop.sd3` converts weights from and to diffusers' and the original
    layout of Stable Diffusion 3 and 3.5.

    Args:
        shape: (channels, height, width) of one image.
        depth: number of blocks.
        heads: attention heads; by default `depth`, the paper's rule.
        head_dim: width of a head; the width of the network is heads * head_dim.
        patch: side of a patch.
        context_dim: length of a context token; 0 takes no context.
        pooled_dim: length of the pooled vector; 0 takes none.
        classes: number of class labels; 0 takes none.
        qk_norm: "rms" normalises queries and keys (for training in half precision), or None.
        dual_layers: numbers of the blocks whose image stream also attends to itself alone.
        max_size: patches along a side of the table of positions; by default those of `shape`.
        position_scale: distance of neighbouring positions; see `positions.training_grid`.
        position_offset: position of the table's first patch.

    Raises:
        ValueError: sides that are no multiples of `patch` or beyond the table, an unknown norm,
            a dual layer that does not exist, sizes that are not positive.

    Example:
        >>> net = MMDiT(shape=(1, 8, 8), depth=2, head_dim=8, context_dim=6, pooled_dim=5)
        >>> x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
        >>> net(x, t, context=torch.randn(2, 7, 6), pooled=torch.randn(2, 5)).shape
        torch.Size([2, 1, 8, 8])

    Source:
        arXiv 2403.03206, section 4 and figure 2; dual attention after the released code of
        Stable Diffusion 3.5 Medium. Labels as tokens and the stand-in token are ours.
    """

    name: ClassVar[str] = "mmdit"
    positions: Tensor

    def __init__(
        self,
        *,
        shape: Sequence[int],
        depth: int = 24,
        heads: int | None = None,
        head_dim: int = 64,
        patch: int = 2,
        context_dim: int = 0,
        pooled_dim: int = 0,
        classes: int = 0,
        qk_norm: str | None = None,
        dual_layers: Sequence[int] = (),
        max_size: int | None = None,
        position_scale: float = 1.0,
        position_offset: float = 0.0,
    ) -> None:
        super().__init__(
            shape=shape,
            depth=depth,
            heads=heads,
            head_dim=head_dim,
            patch=patch,
            context_dim=context_dim,
            pooled_dim=pooled_dim,
            qk_norm=qk_norm,
            dual_layers=tuple(dual_layers),
            max_size=max_size,
            position_scale=position_scale,
            position_offset=position_offset,
            classes=classes,
        )
        heads = depth if heads is None else heads
        sizes = {"depth": depth, "heads": heads, "head_dim": head_dim, "patch": patch}
        for key, value in sizes.items():
            errors.positive(key, value)
        errors.positive("context_dim", context_dim, zero=True)
        errors.positive("pooled_dim", pooled_dim, zero=True)
        if qk_norm not in QK_NORMS:
            raise errors.unknown("qk_norm", str(qk_norm), [str(norm) for norm in QK_NORMS])
        if any(not 0 <= layer < depth for layer in dual_layers):
            raise ValueError(
                f"dual_layers must be from 0 to {depth - 1} for depth {depth}, got "
                f"{tuple(dual_layers)}"
            )
        width = heads * head_dim
        if width % 4:
            raise ValueError(f"heads * head_dim must be a multiple of 4, got {width}")
        _check_sides(self.shape, patch, max_size)
        self.patch = patch
        self.max_size = max(self.shape[1:]) // patch if max_size is None else max_size
        pixels = self.shape[0] * patch**2
        self.patches = linear(pixels, width)
        table = axis_table(self.max_size, width // 2, scale=position_scale, offset=position_offset)
        self.register_buffer("positions", table)
        self.time = _two_layers(TIME_FEATURES, width)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        self.pooled = _two_layers(pooled_dim, width) if pooled_dim else None
        self.context_in = linear(context_dim, width) if context_dim else None
        self.label = LabelEmbedding(classes, width) if classes else None
        alone = not context_dim and not classes
        self.token = nn.Parameter(torch.randn(width) * width**-0.5) if alone else None
        self.blocks = nn.ModuleList(
            JointBlock(
                width, heads, qk_norm=qk_norm, last=i == depth - 1, dual=i in tuple(dual_layers)
            )
            for i in range(depth)
        )
        self.modulation = linear(width, 2 * width, zero=True)
        self.head = linear(width, pixels, zero=True)

    def forward(
        self,
        x: Float[Tensor, "batch c h w"],
        t: Float[Tensor, "batch"],
        *,
        label: Int[Tensor, "batch"] | None = None,
        context: Float[Tensor, "batch l k"] | None = None,
        pooled: Float[Tensor, "batch p"] | None = None,
        skip_layers: Sequence[int] = (),
    ) -> Float[Tensor, "batch c h w"]:
        """The prediction; blocks numbered in `skip_layers` are passed over."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.patches(_cut(x, self.patch))
        tokens = tokens + crop_positions(self.positions, rows, columns)
        # 1 - t in half precision would round small noise levels away.
        level = 1 - t.to(torch.promote_types(t.dtype, torch.float32))
        e = self.time(noise_features(level, TIME_FEATURES).to(x.dtype))
        if self.pooled is not None:
            given = x.new_zeros(1, self.pooled[0].in_features) if pooled is None else pooled
            e = e + self.pooled(given)
        e = F.silu(e)
        said = self._context(x, label, context)
        for index, block in enumerate(self.blocks):
            if index not in skip_layers:
                said, tokens = block(said, tokens, e)
        shift, scale = self.modulation(e).unsqueeze(1).chunk(2, dim=2)
        tokens = self.head(modulated(normalized(tokens), shift, scale))
        return _join(tokens, self.patch, rows, columns)

    def _context(self, x: Tensor, label: Tensor | None, context: Tensor | None) -> Tensor:
        """The tokens of the context stream: the label's, then the given ones."""
        parts = []
        if self.label is not None:
            parts.append(self.label(label).reshape(-1, 1, self.modulation.in_features))
        if self.context_in is not None:
            given = x.new_zeros(1, 1, self.context_in.in_features) if context is None else context
            parts.append(self.context_in(given))
        if self.token is not None:
            parts.append(self.token.reshape(1, 1, -1))
        parts = [part.expand(x.shape[0], -1, -1) for part in parts]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    @property
    def conditional(self) -> bool:
        """Whether the net takes a condition of any kind."""
        return self.classes > 0 or self.context_in is not None or self.pooled is not None

    def null_condition(self, **condition: Tensor | None) -> dict[str, Tensor]:
        """The condition that stands for "none": the null label, zeros for context and pooled.

        Zeros are what a dropped text encoder gives, so the null condition of training without
        text is also that of guidance.

        Raises:
            ValueError: a condition this net does not take.
        """
        null = super().null_condition(**condition)
        for key in ("context", "pooled"):
            value = condition.get(key)
            if value is not None:
                null[key] = torch.zeros_like(value)
        return null

    def check(
        self,
        x: Float[Tensor, "batch *dims"],
        *,
        skip_layers: Sequence[int] = (),
        **condition: Any,
    ) -> None:
        """Raise ValueError unless the net can be called with `x` and this condition.

        Args:
            x: samples, floating point, with the net's channels and any sides that the table of
                positions covers.
            skip_layers: numbers of blocks.
            condition: `label`, `context` (batch, tokens, context_dim), `pooled` (batch,
                pooled_dim).
        """
        given = tuple(x.shape)
        most = self.max_size * self.patch
        whole = len(given) == 4 and not any(side % self.patch for side in given[2:])
        if not whole or given[1] != self.shape[0] or max(given[2:]) > most:
            raise ValueError(
                f"{self.name} takes x of shape (batch, {', '.join(map(str, self.shape))}), got "
                f"{given}; other sides must be multiples of {self.patch} up to {most}"
            )
        # The rest does not depend on the sides, for which the base knows one pair only.
        super().check(x.new_empty(len(x), 1, 1, 1).expand(-1, *self.shape), **condition)
        for key, dims in (("context", 3), ("pooled", 2)):
            value, wide = condition.get(key), self.config[f"{key}_dim"]
            if value is None or (value.ndim, value.shape[-1], len(value)) == (dims, wide, len(x)):
                continue
            wanted = f"{len(x)}, {'tokens, ' if dims == 3 else ''}{wide}"
            raise ValueError(f"{key} must have shape ({wanted}), got {tuple(value.shape)}")
        wrong = [layer for layer in skip_layers if not 0 <= layer < len(self.blocks)]
        if wrong:
            raise ValueError(
                f"skip_layers must be from 0 to {len(self.blocks) - 1}, got {wrong[0]}"
            )

    def _label(self, condition: dict[str, Tensor | None]) -> Tensor | None:
        taken = ["label"]
        taken += ["context"] if self.context_in is not None else []
        taken += ["pooled"] if self.pooled is not None else []
        extra = sorted(set(condition) - set(taken))
        if extra:
            known = ", ".join(map(repr, taken))
            raise ValueError(f"{self.name} takes the condition {known} only, got {extra[0]!r}")
        return super()._label({"label": condition.get("label")})


def _check_sides(shape: tuple[int, ...], patch: int, max_size: int | None) -> None:
    if len(shape) != 3:
        raise ValueError(f"mmdit takes shape (channels, height, width), got {shape}")
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"height and width must be multiples of patch {patch}, got {shape[1]}x{shape[2]}: "
            "resize or pad the images"
        )
    least = max(shape[1:]) // patch
    if max_size is not None and max_size < least:
        raise ValueError(f"max_size must be >= {least} patches for this shape, got {max_size}")


def _two_layers(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(linear(inputs, width), nn.SiLU(), linear(width, width))


def _cut(x: Tensor, patch: int) -> Tensor:
    """Patches row by row, (batch, patches, channels * patch * patch), channels outermost."""
    b, c, h, w = x.shape
    parts = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def _join(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Images from what the head says of each patch, channels innermost."""
    parts = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
