"""The block of the MMDiT: two streams of tokens, each with weights of its own, attend jointly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rectiflow.nets.blocks import linear

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EPS = 1e-6
QK_NORMS = (None, "rms")


def normalized(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulated(
    x: Float[Tensor, "b n width"],
    shift: Float[Tensor, "b 1 width"],
    scale: Float[Tensor, "b 1 width"],
) -> Float[Tensor, "b n width"]:
    """`x (1 + scale) + shift`, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def attend(
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b m heads d"],
    value: Float[Tensor, "b m heads d"],
) -> Float[Tensor, "b n width"]:
    """Softmax attention without a mask; heads are joined again."""
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return mixed.transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """The linear maps around attention: into queries, keys and values, and out again.

    Args:
        width: length of a token.
        heads: number of heads; they divide the width.
        qk_norm: "rms" gives queries and keys of every head unit mean square, then learned
            weights; attention logits stay bounded in half precision. None does nothing.
        silent: the tokens only give keys and values here: there is no way out, and the weights of
            a query norm are kept for the sake of checkpoints but not trained.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: str | None, silent: bool) -> None:
        super().__init__()
        self.heads, self.silent = heads, silent
        self.qkv = linear(width, 3 * width)
        self.out = nn.Identity() if silent else linear(width, width)
        ones = torch.ones(width // heads)
        if silent:
            self.register_buffer("query_norm", ones if qk_norm else None)
        else:
            self.register_parameter("query_norm", nn.Parameter(ones) if qk_norm else None)
        self.register_parameter("key_norm", nn.Parameter(ones.clone()) if qk_norm else None)

    def forward(
        self, x: Float[Tensor, "b n width"]
    ) -> tuple[Tensor | None, Float[Tensor, "b n heads d"], Float[Tensor, "b n heads d"]]:
        """Queries (None for a silent stream), keys and values."""
        if self.silent:
            # Nobody reads what silent tokens would ask for.
            width = x.shape[-1]
            found = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
            key, value = found.unflatten(2, (2, self.heads, -1)).unbind(2)
            return None, self._scaled(key, self.key_norm), value
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self._scaled(query, self.query_norm), self._scaled(key, self.key_norm), value

    @staticmethod
    def _scaled(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)


class Stream(nn.Module):
    """The weights of one stream in one block.

    Args:
        width: length of a token.
        heads: number of heads.
        qk_norm: see `Projections`.
        last: the stream ends here: it is read by the other one and not updated.
        dual: a second attention over this stream's own tokens, beside the joint one.
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: str | None, last: bool = False, dual: bool = False
    ) -> None:
        super().__init__()
        self.parts = 2 if last else 9 if dual else 6
        self.modulation = linear(width, self.parts * width, zero=True)
        self.attention = Projections(width, heads, qk_norm=qk_norm, silent=last)
        self.dual = Projections(width, heads, qk_norm=qk_norm, silent=False) if dual else None
        if not last:
            self.up = linear(width, 4 * width)
            self.down = linear(4 * width, width)

    def modulations(self, e: Float[Tensor, "b width"]) -> tuple[Tensor, ...]:
        """Shift, scale, gate of the attention, the same of the MLP, and of the dual attention."""
        return self.modulation(e).unsqueeze(1).chunk(self.parts, dim=2)

    def mlp(
        self, x: Float[Tensor, "b n width"], shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Float[Tensor, "b n width"]:
        """The second half of a block."""
        hidden = F.gelu(self.up(modulated(normalized(x), shift, scale)), approximate="tanh")
        return torch.addcmul(x, gate, self.down(hidden))


class JointBlock(nn.Module):
    """One block: both streams are modulated, attend to all tokens together, and go their ways.

    Every stream computes its own queries, keys and values; attention runs over the tokens of
    both, context first. Then `x = x + gate attention`, `x = x + gate MLP(x)`, each after a layer
    norm whose shift and scale, like the gates, are linear in the conditioning vector. With all of
    those zero, as at the start of training, the block changes nothing.

    Args:
        width: length of a token.
        heads: number of heads.
        qk_norm: "rms" or None, see `Projections`.
        last: the context ends here (the last block of a network).
        dual: the image stream also attends to itself alone, as in Stable Diffusion 3.5 Medium.

    Example:
        >>> block = JointBlock(8, 2)
        >>> context, image = block(torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(1, 8))
        >>> context.shape, image.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 4, 8]))

    Source: arXiv 2403.03206, figure 2; `dual` after the released code of Stable Diffusion 3.5.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: str | None = None,
        last: bool = False,
        dual: bool = False,
    ) -> None:
        super().__init__()
        self.context = Stream(width, heads, qk_norm=qk_norm, last=last)
        self.image = Stream(width, heads, qk_norm=qk_norm, dual=dual)

    def forward(
        self,
        context: Float[Tensor, "b l width"],
        x: Float[Tensor, "b n width"],
        e: Float[Tensor, "b width"],
    ) -> tuple[Float[Tensor, "b l width"], Float[Tensor, "b n width"]]:
        """The updated streams; `e` is the conditioning vector, already activated."""
        said, seen = self.context.modulations(e), self.image.modulations(e)
        flat = normalized(x)
        asked = self.context.attention(modulated(normalized(context), said[0], said[1]))
        own = self.image.attention(modulated(flat, seen[0], seen[1]))
        query, key, value = (
            torch.cat([a, b], 1) if a is not None else b for a, b in zip(asked, own)
        )
        mixed = attend(query, key, value)
        silent = self.context.attention.silent
        told = 0 if silent else context.shape[1]
        x = torch.addcmul(x, seen[2], self.image.attention.out(mixed[:, told:]))
        if self.image.dual is not None:
            alone = attend(*self.image.dual(modulated(flat, seen[6], seen[7])))
            x = torch.addcmul(x, seen[8], self.image.dual.out(alone))
        x = self.image.mlp(x, *seen[3:6])
        if not silent:
            answer = self.context.attention.out(mixed[:, :told])
            context = self.context.mlp(torch.addcmul(context, said[2], answer), *said[3:6])
        return context, x
