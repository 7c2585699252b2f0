"""A field whose prompts say who does what to whom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive
from rectiflow.flows.guided import Guided, null_of
from rectiflow.guidance.relation_prompts import RelationShifts

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.flows.fields import Field


@dataclass(frozen=True, eq=False)
class RelationRectifier(Guided):
    """A conditional field that sees the ends of its prompts shifted.

    It takes one condition more than the field inside, `relation`: which of the shifts belongs to a
    row. Their number stands for none, as does leaving it out, and that is its null condition; so
    guidance around it, batched or not, compares the shifted condition with the untouched null
    one. Negative conditions are not shifted either.

    Args:
        field: a field whose condition has the part `shifts.key`.
        shifts: what is added, such as `ConditionRectifier.shifts(prompts)`.
        weight: how much of it; 0 is the field inside, bit for bit, and 1 what was trained.

    Raises:
        ValueError: a negative or non-finite weight; when evaluated, a condition that cannot be
            shifted.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t, *, context: x + context)
        >>> field = RelationRectifier(model, RelationShifts(torch.ones(1, 2)), 0.5)
        >>> condition = {"context": torch.zeros(2, 2), "relation": torch.tensor([0, 1])}
        >>> field.velocity(torch.zeros(2, 2), torch.zeros(2), **condition)
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])

    Source: arXiv 2403.20249, section 4.3.
    """

    field: Field
    shifts: RelationShifts
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("weight", self.weight, zero=True)
        if math.isinf(self.weight):
            raise ValueError("weight must be finite, got inf")

    @property
    def conditional(self) -> bool:
        """True: it is for fields that take a condition."""
        return True

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The null condition of the field inside, and no shift."""
        relation = condition.pop("relation", None)
        null = null_of(self.field, condition)
        if relation is None:
            return null
        return {**null, "relation": torch.full_like(relation, len(self.shifts))}

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError unless there is something to shift and the field inside takes it."""
        relation = condition.pop("relation", None)
        if relation is not None:
            value = condition.get(self.shifts.key)
            most = len(self.shifts)
            if value is None:
                raise ValueError(
                    f"relation needs the condition {self.shifts.key!r} to shift, got "
                    f"{', '.join(condition) or 'none'}"
                )
            if value.ndim != (2 if self.shifts.ends is None else 3):
                raise ValueError(
                    f"the condition {self.shifts.key!r} has shape {tuple(value.shape)}, which is "
                    "not what the shifts were made for"
                )
            if relation.dtype != torch.int64 or relation.shape != x.shape[:1]:
                raise ValueError(
                    f"relation must be one int64 number a sample, got {relation.dtype} of shape "
                    f"{tuple(relation.shape)}"
                )
            if len(relation) and not 0 <= int(relation.min()) <= int(relation.max()) <= most:
                raise ValueError(
                    f"relation must be from 0 to {most - 1} ({most} for none), got "
                    f"{int(relation.min())} to {int(relation.max())}"
                )
        super().check(x, **condition)

    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        relation = condition.pop("relation", None)
        if relation is not None and self.weight:
            key = self.shifts.key
            shifted = self.shifts.added(condition[key], relation, self.weight)
            condition = {**condition, key: shifted}
        return getattr(self.field, view)(x, t, **condition)
