"""Guided fields: a conditional field pushed away from what it says under the null condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.fields import Field
    from rectiflow.flows.paths import Path


class _Guided(ABC):
    """The members of a field, all made by one rule for what the field inside says.

    At a fixed state and time every prediction is an affine function of every other, and guidance
    is a combination with weights that sum to one; so guiding velocities, data or noises is the
    same thing.
    """

    field: Field

    @property
    def path(self) -> Path:
        """The path of the field inside."""
        return self.field.path

    def velocity(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The guided direction of travel at `(x, t)`."""
        return self._guide("velocity", x, t, condition)

    def denoise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The guided estimate of the target (data)."""
        return self._guide("denoise", x, t, condition)

    def noise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The guided estimate of the source (noise)."""
        return self._guide("noise", x, t, condition)

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The null condition of the field inside."""
        return _null(self.field, condition)

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if the field inside does not take these states and this condition."""
        known = getattr(self.field, "check", None)
        if known is not None:
            known(x, **condition)

    @abstractmethod
    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """The guided form of a view: velocity, denoise or noise."""


@dataclass(frozen=True)
class ClassifierFree(_Guided):
    """Classifier-free guidance: past the conditional field, away from the null one.

    `v = v_null + scale (v_condition - v_null)`. Scale 1 is the conditional field itself and costs
    one evaluation, as do scale 0 (the null condition) and calls without a condition; any other
    scale costs one call on a batch of twice the size. The field must have been trained with
    `condition_dropout`, or its null condition means nothing. It is a field, so solvers,
    `LivePairs(guided=...)` and `generate_pairs(field=...)` take it in place of the model.

    Args:
        field: the conditional field, with a `null_condition`.
        scale: strength, >= 0. Class-conditional models take 1 to 4, text-conditional 3 to 8.

    Raises:
        ValueError: a negative scale.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x, t, *, label):
        ...         return x * 0 + label[:, None]
        ...     def null_condition(self, *, label):
        ...         return {"label": torch.zeros_like(label)}
        >>> guided = ClassifierFree(FlowModel(Net()), 3.0)
        >>> guided.velocity(torch.ones(1, 2), torch.zeros(1), label=torch.tensor([2]))
        tensor([[6., 6.]])

    Source: Ho and Salimans 2022 (2207.12598), equation 6, with scale = 1 + w; in terms of
        velocities as in arXiv 2403.03206.
    """

    field: Field
    scale: float

    def __post_init__(self) -> None:
        positive("scale", self.scale, zero=True)

    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        return _conditional_and_guided(self.field, view, self.scale, x, t, condition)[1]


@dataclass(frozen=True)
class SkipLayers(_Guided):
    """Guidance away from the same network with some layers left out, beside the classifier-free.

    `v = v_guided + scale (v_condition - v_skipped)`, where `v_skipped` is the conditional output
    with the layers of `layers` passed over, and `v_guided` the classifier-free field of scale
    `guidance`. It firms up structure (hands, anatomy) where guidance alone does not. It applies
    from time `start` to time `stop` only; outside, and without layers, it is `ClassifierFree`.

    Args:
        field: a field whose network takes `skip_layers`, such as one of an `MMDiT`.
        layers: numbers of the blocks to pass over, from 0.
        scale: strength of this term.
        guidance: scale of the classifier-free term; 1 for none.
        start: the time (0 is noise) after which it applies. A share of the steps is this time on
            an equal grid; for a shifted grid it is `shift_times(share, alpha)`.
        stop: the time before which it applies.

    Raises:
        ValueError: negative scales or layers, or times out of order.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> def net(x, t, *, skip_layers=()):
        ...     return x * (2 - len(skip_layers))
        >>> guided = SkipLayers(FlowModel(net), (0,), scale=3.0, stop=0.2)
        >>> guided.velocity(torch.ones(2, 1), torch.tensor([0.1, 0.5])).flatten().tolist()
        [5.0, 2.0]

    Source: sampling of Stable Diffusion 3.5 Medium: layers 7, 8, 9, scale 2.5, guidance 4, from
        1 to 20 percent of the steps.
    """

    field: Field
    layers: Sequence[int] = (7, 8, 9)
    scale: float = 2.5
    guidance: float = 1.0
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        positive("scale", self.scale, zero=True)
        positive("guidance", self.guidance, zero=True)
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers must be >= 0, got {tuple(self.layers)}")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                f"times need 0 <= start <= stop <= 1, got {self.start:g} to {self.stop:g}"
            )
        object.__setattr__(self, "layers", tuple(self.layers))

    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        plain, guided = _conditional_and_guided(
            self.field, view, self.guidance, x, t, condition, conditional=bool(self.layers)
        )
        inside = (t > self.start) & (t < self.stop)
        if not self.layers or not self.scale or not bool(inside.any()):
            return guided
        skipped = getattr(self.field, view)(x, t, skip_layers=self.layers, **condition)
        weight = (self.scale * inside).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return guided + weight * (plain - skipped)


def _conditional_and_guided(
    field: Any,
    view: str,
    scale: float,
    x: Tensor,
    t: Tensor,
    condition: dict[str, Any],
    *,
    conditional: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the field says under the condition, and guided; with scale 0 the former on request."""
    evaluate = getattr(field, view)
    null = _null(field, condition) if scale != 1 and condition else {}
    if not null:
        found = evaluate(x, t, **condition)
        return found, found
    if scale == 0 and not conditional:
        found = evaluate(x, t, **{**condition, **null})
        return found, found
    both = {name: _stack(value, null.get(name, value)) for name, value in condition.items()}
    found = evaluate(torch.cat([x, x]), torch.cat([t, t]), **both)
    with_condition, without = found.chunk(2)
    return with_condition, torch.lerp(without, with_condition, scale)


def _stack(given: Any, null: Any) -> Any:
    """Rows of both branches; what has no rows is shared."""
    return torch.cat([given, null]) if isinstance(given, Tensor) and given.ndim else given


def _null(field: Any, condition: dict[str, Any]) -> dict[str, Any]:
    known = getattr(field, "null_condition", None)
    if known is None:
        raise ValueError(
            f"{type(field).__name__} has no null condition to guide away from: give it a method "
            "null_condition(**condition)"
        )
    return known(**condition)
