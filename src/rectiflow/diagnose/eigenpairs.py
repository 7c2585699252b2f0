"""The largest eigenvalues of a symmetric matrix that is known by its products only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rectiflow.diagnose.hessian import Hessian
from rectiflow.errors import positive, unknown

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

METHODS = ("lanczos", "power")
# Products before Lanczos may stop: a warm start must be able to turn to another eigenvector.
LEAST = 3


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue with its eigenvector, as far as they were found.

    Attributes:
        value: the eigenvalue.
        vector: the eigenvector, of length 1.
        residual: `|H v - value v|`; some eigenvalue is no further than this from the value.
        products: products with the matrix that it took.
    """

    value: float
    vector: Tensor
    residual: float
    products: int


def lanczos(
    operator: Callable[[Tensor], Tensor],
    start: Float[Tensor, " n"],
    *,
    count: int = 1,
    steps: int = 40,
    tolerance: float = 1e-3,
) -> list[Eigenpair]:
    """The largest eigenvalues of a symmetric matrix, by Lanczos' method.

    The best answer that `steps` products allow, whatever sign dominates. All vectors are kept and
    kept orthogonal, which takes memory for `steps` of them.

    Args:
        operator: multiplies a vector by the matrix.
        start: the first vector. One that is an eigenvector finds nothing but itself.
        count: how many eigenvalues.
        steps: most products.
        tolerance: it ends once each residual is below this part of its eigenvalue.

    Returns:
        pairs, the largest eigenvalue first; fewer than `count` where the matrix, seen from the
        start, has fewer.

    Raises:
        ValueError: numbers that are not positive, a start that is zero or not finite.

    Example:
        >>> pairs = lanczos(lambda v: torch.tensor([-9.0, 4.0, 1.0]) * v, torch.ones(3), count=2)
        >>> [round(pair.value, 4) for pair in pairs]
        [4.0, 1.0]

    Source: Lanczos 1950, with full reorthogonalisation.
    """
    positive("count", count)
    positive("steps", steps)
    rows = min(steps, len(start))
    basis = start.new_zeros(rows, len(start))
    basis[0] = _unit(start)
    tri = torch.zeros(rows, rows, dtype=torch.float64)
    for k in range(rows):
        product = operator(basis[k])
        tri[k, k] = float(product @ basis[k])
        # Twice is enough for orthogonality to working precision.
        for _ in range(2):
            product = product - basis[: k + 1].T @ (basis[: k + 1] @ product)
        beta = float(product.norm())
        values, vectors = torch.linalg.eigh(tri[: k + 1, : k + 1])
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        residuals = beta * vectors[-1].abs()
        scale = float(tri.abs().amax())
        ended = beta <= 10 * torch.finfo(start.dtype).eps * scale
        close = k + 1 >= max(LEAST, count) and bool((residuals <= tolerance * values.abs()).all())
        if ended or close or k + 1 == rows:
            break
        tri[k, k + 1] = tri[k + 1, k] = beta
        basis[k + 1] = product / beta
    ritz = vectors.T.to(basis) @ basis[: k + 1]
    return [
        Eigenpair(value, _unit(vector), residual, k + 1)
        for value, vector, residual in zip(values.tolist(), ritz, residuals.tolist())
    ]


def power_iteration(
    operator: Callable[[Tensor], Tensor],
    start: Float[Tensor, " n"],
    *,
    steps: int = 20,
    tolerance: float = 1e-3,
) -> Eigenpair:
    """The largest eigenvalue of a symmetric matrix, by multiplying again and again.

    It needs two vectors of memory and, from a warm start, few products. Left alone it finds the
    eigenvalue of largest magnitude; where a negative one dominates, it begins again with the matrix
    shifted by that magnitude, which takes up to `steps` further products.

    Args:
        operator: multiplies a vector by the matrix.
        start: the first vector, such as the eigenvector of a little while ago.
        steps: most products.
        tolerance: it ends once the residual is below this part of the eigenvalue.

    Raises:
        ValueError: no steps, a start that is zero or not finite.

    Example:
        >>> pair = power_iteration(lambda v: torch.tensor([4.0, 1.0, 0.0]) * v, torch.ones(3))
        >>> round(pair.value, 4)
        4.0
    """
    positive("steps", steps)
    found, length = _multiply(operator, _unit(start), 0.0, steps, tolerance)
    if found.value > 0.9 * length or length == 0:
        return found
    shifted, _ = _multiply(operator, _unit(start), length, steps, tolerance)
    return Eigenpair(
        shifted.value, shifted.vector, shifted.residual, found.products + shifted.products
    )


def _multiply(
    operator: Callable[[Tensor], Tensor],
    vector: Tensor,
    shift: float,
    steps: int,
    tolerance: float,
) -> tuple[Eigenpair, float]:
    """Power iteration with `H + shift`; also the length of the last product with H."""
    for count in range(1, steps + 1):
        product = operator(vector)
        value, length = float(vector @ product), float(product.norm())
        residual = float((product - value * vector).norm())
        if residual <= tolerance * abs(value) or length == 0 or count == steps:
            break
        vector = _unit(product + shift * vector)
    return Eigenpair(value, vector, residual, count), length


def top_eigenpair(
    hessian: Hessian,
    *,
    method: str = "lanczos",
    start: Float[Tensor, " n"] | None = None,
    steps: int = 40,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Eigenpair:
    """The sharpness: the largest eigenvalue of a Hessian, with its direction.

    Gradient descent with rate lr is stable along this direction while `lr value < 2`.

    Args:
        hessian: the Hessian.
        method: "lanczos" (fewest products) or "power" (least memory).
        start: a vector to start from, such as the one found a few steps earlier; a hundredth of
            noise is mixed in, so that it can be left again. Random by default.
        steps: most products.
        tolerance: largest residual, as a part of the eigenvalue.
        generator: the source of randomness, on the weights' device.

    Raises:
        ValueError: an unknown method.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> h = Hessian(lambda s: (s * w.square()).sum() / 2, [w], [torch.tensor([3.0, 5.0])])
        >>> round(top_eigenpair(h).value, 4)
        5.0
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    first = torch.randn(len(hessian), generator=generator, device=hessian.device)
    first = _unit(first.to(hessian.dtype))
    if start is not None:
        first = _unit(start.to(first)) + 0.01 * first
    if method == "power":
        return power_iteration(hessian.__matmul__, first, steps=steps, tolerance=tolerance)
    return lanczos(hessian.__matmul__, first, steps=steps, tolerance=tolerance)[0]


def _unit(vector: Tensor) -> Tensor:
    length = vector.norm()
    if not (length > 0 and length.isfinite()):
        raise ValueError(f"a direction needs a length that is finite and > 0, got {float(length)}")
    return vector / length
