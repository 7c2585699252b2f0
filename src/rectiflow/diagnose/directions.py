"""What a loss does along a direction of travel: slope, curvature, and how far it falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow.diagnose.hessian import Hessian
from rectiflow.diagnose.looking import untouched
from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class DirectionalSharpness:
    """A step's direction v against the loss: `f(w - r v/|v|) = f(w) - r C + r² S / 2 + ...`.

    Attributes:
        sharpness: S, the curvature along it, `v'Hv / |v|²`. Negative where the loss bends down.
        correlation: C, how much of the gradient lies along it, `<g, v> / |v|`.
        gradient_norm: `|g|`.
    """

    sharpness: float
    correlation: float
    gradient_norm: float

    @property
    def cosine(self) -> float:
        """Cosine of the direction and the gradient; 0 where there is no gradient."""
        return self.correlation / self.gradient_norm if self.gradient_norm else 0.0

    @property
    def best_distance(self) -> float:
        """The distance C / S at which the quadratic model is least; infinite where S <= 0."""
        return self.correlation / self.sharpness if self.sharpness > 0 else math.inf

    @property
    def best_decrease(self) -> float:
        """How far the quadratic model falls by then, `C² / (2 S)`."""
        return self.correlation**2 / (2 * self.sharpness) if self.sharpness > 0 else math.inf


def directional_sharpness(
    loss: Callable[[Any], Tensor],
    params: Iterable[Any],
    direction: Float[Tensor, " n"] | Sequence[Tensor],
    batches: Sequence[Any],
    *,
    module: nn.Module | None = None,
    batch_statistics: bool = False,
) -> DirectionalSharpness:
    """How sharply a loss is curved along a direction, and how much it slopes.

    Use it to compare optimizers at the same weights (`Shadows` has their directions): those that
    need small steps travel where the loss is sharply curved. Measure on batches that the direction
    was not made from, the same for all. One Hessian-vector product; scale and sign of the direction
    do not matter to S. `p.grad` and the model are left as they are.

    Args:
        loss: from a batch to the mean loss over it.
        params: the weights.
        direction: what is subtracted from the weights, up to scale: one flat vector, or one tensor
            a weight.
        batches: what the loss is averaged over; each counts the same.
        module: the model, which is looked at in evaluation mode.
        batch_statistics: see `Hessian`.

    Raises:
        ValueError: a direction of length 0, or of another shape; otherwise see `Hessian`.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> scale = torch.tensor([3.0, 5.0])
        >>> found = directional_sharpness(
        ...     lambda s: (s * w.square()).sum() / 2, [w], torch.tensor([0.0, 7.0]), [scale])
        >>> found.sharpness, found.correlation, found.best_distance, found.best_decrease
        (5.0, 10.0, 2.0, 10.0)

    Source: arXiv 2306.00204, section 3.
    """
    hessian = Hessian(loss, params, batches, module=module, batch_statistics=batch_statistics)
    unit = _unit(hessian, direction)
    gradient = hessian.gradient()
    return DirectionalSharpness(
        float(unit @ (hessian @ unit)), float(gradient @ unit), float(gradient.norm())
    )


@dataclass(frozen=True)
class Landscape:
    """The loss along a direction.

    Attributes:
        distances: how far the weights were moved, in units of length.
        losses: the loss there.
        start: the loss without moving.
    """

    distances: tuple[float, ...]
    losses: tuple[float, ...]
    start: float

    @property
    def best(self) -> int:
        """Number of the lowest point."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    @property
    def best_distance(self) -> float:
        """Where the loss was lowest; 0 if nowhere below the start."""
        return self.distances[self.best] if self.best_decrease > 0 else 0.0

    @property
    def best_decrease(self) -> float:
        """How far below the start the loss got; 0 if nowhere."""
        return max(0.0, self.start - self.losses[self.best])


def landscape(
    loss: Callable[[Any], Tensor],
    params: Iterable[Any],
    direction: Float[Tensor, " n"] | Sequence[Tensor],
    batches: Sequence[Any],
    distances: Sequence[float],
    *,
    module: nn.Module | None = None,
    stop: bool = False,
) -> Landscape:
    """The loss at weights moved by given distances against a direction.

    Args:
        loss: from a batch to the mean loss over it.
        params: the weights; they are moved, and put back bit for bit.
        direction: what is subtracted, up to scale.
        batches: what the loss is averaged over.
        distances: lengths of the moves.
        module: the model, which is looked at in evaluation mode.
        stop: leave out what follows the first point above the start.

    Raises:
        ValueError: no distances; otherwise see `directional_sharpness`.

    Example:
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> seen = landscape(lambda _: w.square().sum(), [w], torch.ones(1), [None], [1.0, 3.0])
        >>> seen.losses, seen.best_distance, seen.best_decrease
        ((4.0, 0.0), 3.0, 9.0)

    Source: arXiv 2306.00204, section 3.
    """
    if not len(distances):
        raise ValueError("a landscape needs one distance or more, got none")
    hessian = Hessian(loss, params, batches, module=module)
    unit = hessian.unflatten(_unit(hessian, direction))
    seen: list[float] = []
    with _moving(hessian, unit) as loss_at:
        start = loss_at(0.0)
        for distance in distances:
            seen.append(loss_at(distance))
            if stop and not seen[-1] <= start:
                break
    return Landscape(tuple(map(float, distances[: len(seen)])), tuple(seen), start)


def best_step(
    loss: Callable[[Any], Tensor],
    params: Iterable[Any],
    direction: Float[Tensor, " n"] | Sequence[Tensor],
    batches: Sequence[Any],
    *,
    reach: float,
    points: int = 20,
    rounds: int = 8,
    module: nn.Module | None = None,
) -> Landscape:
    """The landscape on a grid whose spacing suits it: how far one step can bring the loss down.

    A minimum among the first three points means that the grid is too wide: its spacing is divided
    by 5. One at the last point means that it is too short: it is multiplied by 5.

    Args:
        loss: from a batch to the mean loss over it.
        params: the weights; they are moved, and put back bit for bit.
        direction: what is subtracted, up to scale.
        batches: what the loss is averaged over.
        reach: length of the first grid, such as twice `DirectionalSharpness.best_distance`.
        points: points of a grid.
        rounds: most grids.
        module: the model, which is looked at in evaluation mode.

    Raises:
        ValueError: numbers that are not positive and finite; otherwise see `landscape`.

    Source: arXiv 2306.00204, section 3 and its official code.
    """
    positive("points", points)
    positive("rounds", rounds)
    if not (reach > 0 and math.isfinite(reach)):
        raise ValueError(f"reach must be > 0 and finite, got {reach}")
    for _ in range(rounds):
        grid = [reach * (i + 1) / points for i in range(points)]
        found = landscape(loss, params, direction, batches, grid, module=module, stop=True)
        if found.best < 3 and points > 3:
            reach /= 5
        elif found.best == points - 1:
            reach *= 5
        else:
            break
    return found


def curvature_by_losses(
    loss: Callable[[Any], Tensor],
    params: Iterable[Any],
    update: Sequence[Tensor],
    batches: Sequence[Any],
    *,
    module: nn.Module | None = None,
) -> float:
    """Curvature along the last update from three losses, where Hessians are too dear.

    `(f(w + u) - 2 f(w) + f(w - u)) / |u|²`, which is `u'Hu / |u|²` up to fourth derivatives.

    Args:
        loss: from a batch to the mean loss over it.
        params: the weights; they are moved, and put back bit for bit.
        update: a change of the weights, one tensor each; its length is used.
        batches: what the loss is averaged over.
        module: the model, which is looked at in evaluation mode.
    """
    hessian = Hessian(loss, params, batches, module=module)
    length = float(hessian.flatten(update).norm())
    unit = hessian.unflatten(_unit(hessian, update))
    with _moving(hessian, unit) as loss_at:
        behind, here, ahead = (loss_at(distance) for distance in (-length, 0.0, length))
    return (behind - 2 * here + ahead) / length**2


@contextmanager
def _moving(hessian: Hessian, unit: Sequence[Tensor]) -> Iterator[Callable[[float], float]]:
    """A function from a distance to the loss there; the weights are put back afterwards."""
    params = hessian.params
    kept = [p.detach().clone() for p in params]

    def loss_at(distance: float) -> float:
        for p, was, part in zip(params, kept, unit):
            p.copy_(was - distance * part if distance else was)
        total = sum(float(hessian.loss(batch)) for batch in hessian.batches)
        return total / len(hessian.batches)

    with untouched(hessian.module), torch.no_grad():
        try:
            yield loss_at
        finally:
            for p, was in zip(params, kept):
                p.copy_(was)


def _unit(hessian: Hessian, direction: Tensor | Sequence[Tensor]) -> Tensor:
    """A direction as a flat vector of length 1."""
    if isinstance(direction, torch.Tensor):
        vector = direction.to(hessian.dtype)
    else:
        vector = hessian.flatten(direction)
    if vector.shape != (len(hessian),):
        raise ValueError(
            f"a direction for {len(hessian)} weights has that many numbers, got shape "
            f"{tuple(vector.shape)}"
        )
    length = vector.norm()
    if not (length > 0 and length.isfinite()):
        raise ValueError(f"a direction needs a length that is finite and > 0, got {float(length)}")
    return vector / length
