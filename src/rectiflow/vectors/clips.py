"""Bounds on the size of vectors, pixels and coordinates.

One clip for per-sample gradients, guidance terms, image gradients and coordinates. What lies within
the bound comes back bit for bit; NaN and infinity are not repaired. The layout is the one of
`rectiflow.vectors.batchwise`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rectiflow.vectors.batchwise import length_of, per_vector, vector_dims, wide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def clip_norm(
    vector: Float[Tensor, "*shape"], bound: float | Tensor, *, start: int = 1
) -> Float[Tensor, "*shape"]:
    """Shorten each vector that is longer than `bound` to exactly that length.

    `v min(1, bound / ||v||)`: the clip of per-sample (private) gradients and of guidance terms.
    A vector within the bound comes back bit for bit. NaN and infinity are not repaired. In half
    precision the result may pass the bound by the rounding of that dtype.

    Args:
        vector: vectors.
        bound: largest norm allowed, a number or one per vector.
        start: first dimension that belongs to the vector.

    Returns:
        the clipped vectors.

    Raises:
        ValueError: a negative number, or `start` is not a dimension count of `vector`.

    Example:
        >>> clip_norm(torch.tensor([[3., 4.], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    full = wide(vector)
    size = length_of(full, vector_dims(full, start))
    return _shrink(full, size, per_vector("bound", bound, full, start)).to(vector.dtype)


def clip_value(
    vector: Float[Tensor, "*shape"], bound: float | Tensor, *, start: int = 1
) -> Float[Tensor, "*shape"]:
    """Bring each coordinate into [-bound, bound].

    Args:
        vector: vectors.
        bound: largest magnitude allowed, a number or one per vector.
        start: first dimension that belongs to the vector (matters only for a tensor `bound`).

    Returns:
        the clipped vectors; coordinates within the bound are unchanged bit for bit.

    Raises:
        ValueError: a negative number.

    Example:
        >>> clip_value(torch.tensor([[-3., 0.5]]), 1.0)
        tensor([[-1.0000,  0.5000]])
    """
    limit = per_vector("bound", bound, vector, start)
    return vector.clamp(-limit, limit)


def clip_pixels(
    vector: Float[Tensor, "b c *space"], bound: float | Tensor, *, order: float = 2
) -> Float[Tensor, "b c *space"]:
    """Shorten the channel vector of each pixel that is longer than `bound`, keeping its direction.

    Args:
        vector: images or image gradients, channels second.
        bound: largest norm allowed, a number or one per image.
        order: the norm over the channels, 2 or infinity.

    Returns:
        the clipped images; pixels within the bound are unchanged bit for bit.

    Raises:
        ValueError: a negative number, another order, or fewer than two dimensions.

    Example:
        >>> clip_pixels(torch.tensor([3., 4.]).view(1, 2, 1, 1), 1.0).flatten()
        tensor([0.6000, 0.8000])

    Source:
        arXiv 2310.12474: the paper bounds the 2-norm; its code bounds the largest channel.
    """
    if order not in (2, math.inf):
        raise ValueError(f"order must be 2 or math.inf, got {order}")
    if vector.ndim < 2:
        raise ValueError(f"images need a batch and a channel dimension, got {vector.ndim}-D")
    full = wide(vector)
    size = length_of(full, (1,)) if order == 2 else full.abs().amax(1, keepdim=True)
    return _shrink(full, size, per_vector("bound", bound, full, 1)).to(vector.dtype)


def _shrink(a: Tensor, size: Tensor, bound: Tensor) -> Tensor:
    """Scale down where `size` exceeds `bound`; elsewhere multiply by one, which changes no bit."""
    over = size > bound
    # Both operands are replaced, not the quotient: an infinite bound must not meet the gradient.
    return a * (torch.where(over, bound, 1.0) / torch.where(over, size, 1.0))
