"""Inner products, splits and balances of vectors laid out batch-wise.

Dimensions from `start` on form the vector, those before index it: `start=1` is one vector per
sample or output channel, `start=0` takes the whole tensor as one vector.

Nothing is written to its inputs, nothing waits for a device, and every function is differentiable
with finite gradients at zero vectors. Half-precision inputs are computed in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Split(NamedTuple):
    """A vector as `parallel + orthogonal` with respect to a reference."""

    parallel: Float[Tensor, "*shape"]
    orthogonal: Float[Tensor, "*shape"]


def inner(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], *, start: int = 1
) -> Float[Tensor, "*lead"]:
    """Inner product of each vector of `a` with the one of `b`.

    Args:
        a: vectors.
        b: vectors of the same shape.
        start: first dimension that belongs to the vector.

    Returns:
        one number per vector, shape `a.shape[:start]`; float32 for half-precision inputs.

    Raises:
        ValueError: the shapes differ or `start` is not a dimension count of `a`.

    Example:
        >>> inner(torch.ones(2, 3), torch.tensor([[1., 2., 3.], [0., 0., 1.]]))
        tensor([6., 1.])
    """
    _same_shape(a, b)
    dims = vector_dims(a, start)
    product = wide(a) * wide(b)
    # An empty list of dimensions would make torch sum over all of them.
    return product.sum(dims) if dims else product


def norm(a: Float[Tensor, "*shape"], *, start: int = 1) -> Float[Tensor, "*lead"]:
    """Euclidean norm of each vector.

    Entries are divided by the largest one before they are squared, so lengths from the smallest to
    the largest number of the dtype neither vanish nor overflow.

    Args:
        a: vectors.
        start: first dimension that belongs to the vector.

    Returns:
        one number per vector, shape `a.shape[:start]`; float32 for half-precision inputs.

    Raises:
        ValueError: `start` is not a dimension count of `a`.

    Example:
        >>> norm(torch.tensor([[3., 4.], [0., 0.]]))
        tensor([5., 0.])
    """
    return length_of(a, vector_dims(a, start)).reshape(a.shape[:start])


def cosine(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], *, start: int = 1
) -> Float[Tensor, "*lead"]:
    """Cosine of the angle between each vector of `a` and the one of `b`, 0 if either is zero.

    Args:
        a: vectors.
        b: vectors of the same shape.
        start: first dimension that belongs to the vector.

    Returns:
        numbers in [-1, 1], shape `a.shape[:start]`.

    Raises:
        ValueError: the shapes differ or `start` is not a dimension count of `a`.

    Example:
        >>> cosine(torch.tensor([[1., 0.]]), torch.tensor([[1., 1.]]))
        tensor([0.7071])
    """
    _same_shape(a, b)
    unit_a, unit_b = (rescale(wide(v), 1.0, start=start) for v in (a, b))
    return inner(unit_a, unit_b, start=start).clamp(-1.0, 1.0)


def split_parallel(
    vector: Float[Tensor, "*shape"], reference: Float[Tensor, "*shape"], *, start: int = 1
) -> Split:
    """Split each vector into the part along its reference and the part at a right angle to it.

    `parallel = <v, r> / <r, r> r`, `orthogonal = v - parallel`. This is the one projection behind
    guidance (APG), radial projection of weights (AdamP, SGDP) and orthogonal gradients (O-DICE).
    It does not depend on the length of the reference; a zero reference gives `parallel = 0`.

    Args:
        vector: what is split.
        reference: the directions, same shape.
        start: first dimension that belongs to the vector.

    Returns:
        both parts in the dtype of `vector`.

    Raises:
        ValueError: the shapes differ or `start` is not a dimension count of `vector`.

    Example:
        >>> split = split_parallel(torch.tensor([[3., 4.]]), torch.tensor([[0., 2.]]))
        >>> split.parallel, split.orthogonal
        (tensor([[0., 4.]]), tensor([[3., 0.]]))
    """
    _same_shape(vector, reference)
    dims = vector_dims(vector, start)
    full, unit = wide(vector), wide(reference)
    unit = unit / _peak(unit, dims)
    square = _sum(unit * unit, dims)
    share = _sum(full * unit, dims) / torch.where(square > 0, square, 1)
    parallel = share * unit
    return Split(parallel.to(vector.dtype), (full - parallel).to(vector.dtype))


def rescale(
    vector: Float[Tensor, "*shape"], length: float | Tensor, *, start: int = 1
) -> Float[Tensor, "*shape"]:
    """Give each vector a chosen length without turning it; zero vectors stay zero.

    Args:
        vector: vectors.
        length: the new norm, a number or one per vector (any shape that broadcasts against
            `vector.shape[:start]`).
        start: first dimension that belongs to the vector.

    Returns:
        vectors of that length.

    Raises:
        ValueError: a negative number, or `start` is not a dimension count of `vector`.

    Example:
        >>> rescale(torch.tensor([[3., 4.], [0., 0.]]), 10.0)
        tensor([[6., 8.],
                [0., 0.]])
    """
    dims = vector_dims(vector, start)
    full = wide(vector)
    unit = full / _peak(full, dims)
    size = torch.linalg.vector_norm(unit, dim=dims, keepdim=True) if dims else unit.abs()
    factor = per_vector("length", length, full, start) / torch.where(size > 0, size, 1)
    return (unit * factor).to(vector.dtype)


def balance(vectors: Float[Tensor, "k *shape"], *, start: int = 2) -> Float[Tensor, "k *shape"]:
    """Give the k vectors of each sample the same length, their mean length.

    `v_i m / ||v_i||` with `m` the mean of the non-zero `||v_j||`: no task outweighs another, and
    the lengths still sum to what they did. Zero vectors stay zero and do not count.

    Args:
        vectors: k vectors per sample, stacked along the first dimension.
        start: first dimension that belongs to the vector; 2 for a stack of batches.

    Returns:
        the balanced vectors, same shape.

    Raises:
        ValueError: `start` is not between 1 and the number of dimensions.

    Example:
        >>> balance(torch.tensor([[[4., 0.]], [[0., 2.]]]))
        tensor([[[3., 0.]],
        <BLANKLINE>
                [[0., 3.]]])
    """
    _stacked(start)
    lengths = norm(vectors, start=start)
    mean = lengths.sum(0) / (lengths > 0).sum(0).clamp(min=1)
    return rescale(vectors, mean.expand_as(lengths), start=start)


def combine(
    vectors: Float[Tensor, "k *shape"],
    weights: Tensor | None = None,
    *,
    match: bool = False,
    start: int = 2,
) -> Float[Tensor, "*shape"]:
    """Weighted mean of k vectors per sample, on request as long as its parts were.

    `e = sum_i w_i v_i` with the weights divided by their sum. Averaging shortens vectors that
    disagree; `match=True` gives `e` the length `sqrt(sum_i w_i ||v_i||^2)`, which changes nothing
    when all agree. A mean of zero stays zero.

    Args:
        vectors: k vectors per sample, stacked along the first dimension.
        weights: non-negative, shape (k,) or (k, b); equal by default.
        match: restore the length lost by averaging.
        start: first dimension that belongs to the vector; 2 for a stack of batches.

    Returns:
        one vector per sample, shape `vectors.shape[1:]`.

    Raises:
        ValueError: `start` is not between 1 and the number of dimensions.

    Example:
        >>> pair = torch.tensor([[[1., 0.]], [[0., 1.]]])
        >>> combine(pair), combine(pair, match=True)
        (tensor([[0.5000, 0.5000]]), tensor([[0.7071, 0.7071]]))

    Source:
        arXiv 2412.02693 (balanced anagrams). Its variance repair assumes unit-variance parts and
        so lengthens even identical ones; matching the parts' own lengths does not.
    """
    _stacked(start)
    vector_dims(vectors, start)
    full = wide(vectors)
    if weights is None:
        share = full.new_ones((full.shape[0],) + (1,) * (start - 1))
    else:
        share = weights.to(full.dtype)
        share = share.reshape(*share.shape, *(1,) * (start - share.ndim))
    share = share / share.sum(0)
    mean = (full * _trail(share, full.ndim)).sum(0)
    if match:
        square = (share * norm(full, start=start).square()).sum(0)
        positive_square = square > 0
        # sqrt has an infinite slope at 0: the inner `where` keeps it out of the gradient.
        length = torch.where(positive_square, torch.where(positive_square, square, 1).sqrt(), 0)
        mean = rescale(mean, length, start=start - 1)
    return mean.to(vectors.dtype)


def wide(a: Tensor) -> Tensor:
    """Half-precision values in float32, others as they are."""
    return a.float() if a.dtype in (torch.float16, torch.bfloat16) else a


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"both need the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def vector_dims(a: Tensor, start: int) -> tuple[int, ...]:
    if not 0 <= start <= a.ndim:
        raise ValueError(f"start must lie in 0..{a.ndim} for a {a.ndim}-D tensor, got {start}")
    return tuple(range(start, a.ndim))


def _stacked(start: int) -> None:
    if start < 1:
        raise ValueError(f"start must be >= 1: the first dimension stacks the vectors, got {start}")


def _trail(a: Tensor, ndim: int) -> Tensor:
    """Append dimensions of size one."""
    return a.reshape(*a.shape, *(1,) * (ndim - a.ndim))


def per_vector(name: str, value: float | Tensor, like: Tensor, start: int) -> Tensor:
    """The value as a tensor that broadcasts over the vectors of `like`."""
    if not isinstance(value, torch.Tensor):
        positive(name, value, zero=True)
        return like.new_full((), value)
    value = value.to(like.dtype)
    return value if value.ndim == 0 else _trail(value, value.ndim + like.ndim - start)


def _sum(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    return a.sum(dims, keepdim=True) if dims else a


def _peak(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest magnitude of each vector as a constant, 1 where it is zero or not finite."""
    size = a.detach().abs()
    if dims and size.numel():
        size = size.amax(dims, keepdim=True)
    elif dims:
        size = size.sum(dims, keepdim=True)
    return torch.where((size > 0) & size.isfinite(), size, 1)


def length_of(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Norm over `dims`, kept as size one."""
    a = wide(a)
    if not dims:
        return a.abs()
    peak = _peak(a, dims)
    return torch.linalg.vector_norm(a / peak, dim=dims, keepdim=True) * peak
