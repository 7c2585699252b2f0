"""What guided fields share: their members, both branches of a condition, when guidance applies."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.fields import Field
    from rectiflow.flows.paths import Path


# What each member of a field is a prediction of.
VIEWS = {"velocity": "velocity", "denoise": "data", "noise": "noise"}


def begun(field: Any) -> Any:
    """The field for one trajectory: with a fresh memory if it has one, else the field itself.

    `integrate` calls it at the start of every trajectory, as it binds solvers. A field around
    fields passes it on by a method `begin` that returns itself around `begun(inner)`.

    Example:
        >>> field = lambda x, t: x
        >>> begun(field) is field
        True
    """
    begin = getattr(field, "begin", None)
    return field if begin is None else begin()


def refuse_memory(field: Any, reason: str) -> None:
    """Raise ValueError for a field that remembers its evaluations, where that cannot be right."""
    if getattr(field, "remembers", False):
        raise ValueError(
            f"{reason}, so a field that remembers its evaluations (guidance with momentum) cannot "
            "be followed: set momentum=0"
        )


def refuse_turns(field: Any) -> None:
    """Raise ValueError for a field whose parts take turns, where steps are evaluated at their end.

    The time there is that of the next step, whose turn is another.
    """
    if getattr(field, "alternates", False):
        raise ValueError(
            "views that alternate need a solver that looks at a step's beginning and middle alone, "
            "since at its end it is the turn of the next: take euler or midpoint"
        )


class Guided(ABC):
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

    @property
    def prediction(self) -> str:
        """What the network inside predicts; velocity for a field without one."""
        return getattr(self.field, "prediction", "velocity")

    @property
    def remembers(self) -> bool:
        """Whether an evaluation depends on earlier ones of the trajectory."""
        return bool(getattr(self.field, "remembers", False))

    @property
    def alternates(self) -> bool:
        """Whether the number of the step decides what is asked, which the time must tell."""
        return bool(getattr(self.field, "alternates", False))

    def begin(self) -> Any:
        """The field for one trajectory; see `begun`."""
        inner = begun(self.field)
        if inner is self.field:
            return self
        return dataclasses.replace(self, field=inner)  # type: ignore[type-var]

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
        return null_of(self.field, condition)

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if the field inside does not take these states and this condition."""
        known = getattr(self.field, "check", None)
        if known is not None:
            known(x, **condition)

    @abstractmethod
    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """The guided form of a view: velocity, denoise or noise."""


@dataclass(frozen=True, eq=False)
class AgainstNull(Guided):
    """Guidance by the difference between a condition and its null, within an interval of times.

    The base of `ClassifierFreeGuidance` and `APG`, which say how both answers are combined.
    """

    field: Field
    scale: float
    negative: Mapping[str, Any] | None = dataclasses.field(default=None, kw_only=True)
    start: float = dataclasses.field(default=0.0, kw_only=True)
    stop: float = dataclasses.field(default=1.0, kw_only=True)
    batched: bool = dataclasses.field(default=True, kw_only=True)
    recorded_as: ClassVar[str] = ""

    def __post_init__(self) -> None:
        positive("scale", self.scale, zero=True)
        if math.isinf(self.scale):
            raise ValueError("scale must be finite, got inf")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"guidance needs 0 <= start < stop <= 1, got {self.start:g} to {self.stop:g}"
            )

    @property
    def description(self) -> str:
        """Name and settings other than the defaults, as records of pairs keep them."""
        said: dict[str, Any] = {"scale": self.scale}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.name in ("field", "scale", "batched") or one.name.startswith("_"):
                continue
            if value != one.default:
                said[one.name] = _digest(value) if one.name == "negative" else value
        if isinstance(self.field, AgainstNull):
            said["field"] = self.field.description
        inside = ", ".join(f"{name}={value}" for name, value in said.items())
        return f"{self.recorded_as or type(self).__name__}({inside})"

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if there is nothing to guide, or the field inside refuses."""
        if self.scale != 1 and not condition:
            raise ValueError(
                f"{type(self).__name__} needs a condition to guide toward, got none: give one "
                "(such as label=...) or follow the field itself"
            )
        super().check(x, **condition)

    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        null = null_of(self.field, condition, self.negative) if self.scale != 1 else {}
        inside = within(t, self.start, self.stop)
        # A field that remembers is asked for both all along: its rows must not change.
        skips = inside is not None and not getattr(self.field, "remembers", False)
        if not null or (skips and surely_none(inside)):
            return getattr(self.field, view)(x, t, **condition)
        full = {**condition, **null}
        return self._guided(view, x, t, condition, full, inside)

    @abstractmethod
    def _guided(
        self,
        view: str,
        x: Tensor,
        t: Tensor,
        condition: dict[str, Any],
        null: dict[str, Any],
        inside: Tensor | None,
    ) -> Tensor:
        """The guided view where it applies to some row; `inside` marks those, None means all."""


def toward(conditional: Tensor, null: Tensor, scale: float, inside: Tensor | None) -> Tensor:
    """`null + scale (conditional - null)`, and the conditional answer itself in rows outside."""
    if inside is None:
        return torch.lerp(null, conditional, scale)
    weight = torch.where(rows_of(inside, conditional), scale, 1.0).to(conditional.dtype)
    return torch.lerp(null, conditional, weight)


def both_branches(
    field: Any,
    view: str,
    x: Tensor,
    t: Tensor,
    condition: Mapping[str, Any],
    null: Mapping[str, Any],
    *,
    batched: bool = True,
) -> tuple[Tensor, Tensor]:
    """What the field says under a condition and under its null, in one call or in two.

    Values without rows cannot differ within a batch; where they do, two calls are made.

    Raises:
        ValueError: two calls of a field that remembers its evaluations.
    """
    evaluate = getattr(field, view)
    shared = all(has_rows(v) or v is null[k] or _same(v, null[k]) for k, v in condition.items())
    if not (batched and shared):
        refuse_memory(field, "the condition and its null take two calls at one time")
        return evaluate(x, t, **condition), evaluate(x, t, **null)
    both = {k: torch.cat([v, null[k]]) if has_rows(v) else v for k, v in condition.items()}
    with_condition, without = evaluate(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
    return with_condition, without


def null_of(
    field: Any, condition: Mapping[str, Any], negative: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The condition to guide away from: the null one, with the negative one in its place.

    Raises:
        ValueError: the field knows no null condition, or the negative one does not fit.
    """
    negative = negative or {}
    for name in negative:
        if condition and name not in condition:
            raise ValueError(
                f"the negative condition gives {name!r}, but samples are conditioned on "
                f"{', '.join(condition)}: use the same names"
            )
    rest = [name for name in condition if name not in negative]
    known = getattr(field, "null_condition", None)
    if rest and known is None:
        raise ValueError(
            f"{type(field).__name__} has no null condition to guide away from: give it a method "
            "null_condition(**condition)"
        )
    null = dict(known(**condition)) if rest and known is not None else {}
    for name in condition:
        if name in negative:
            null[name] = _like(name, negative[name], condition[name])
    return null


def within(t: Tensor, start: float, stop: float) -> Tensor | None:
    """Rows at times from start to stop, both included; None where that is all of time."""
    if start <= 0 and stop >= 1:
        return None
    return (t >= start) & (t <= stop)


def surely_none(inside: Tensor) -> bool:
    """Whether no row is marked, as far as can be told without waiting for a device."""
    if inside.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bool(inside.any())


def rows_of(mask: Tensor, x: Tensor) -> Tensor:
    """One value a row, shaped to broadcast over `x`."""
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


def _like(name: str, value: Any, given: Any) -> Any:
    """A negative value with the rows of the one given."""
    if not isinstance(given, Tensor):
        return value
    if not isinstance(value, Tensor):
        return torch.full_like(given, value)
    value = value.to(given.device, given.dtype)
    value = value.unsqueeze(0) if value.ndim == given.ndim - 1 else value
    same = value.ndim == given.ndim and value.shape[1:] == given.shape[1:]
    if same and value.shape[0] in (1, given.shape[0]):
        return value.expand_as(given)
    raise ValueError(
        f"the negative condition {name!r} must have the shape {tuple(given.shape)} of the one "
        f"given, or one row of it, got {tuple(value.shape)}"
    )


def has_rows(value: Any) -> bool:
    """Whether a part of a condition has a row for each sample."""
    return isinstance(value, Tensor) and value.ndim > 0


def _same(value: Any, other: Any) -> bool:
    """Whether plain values agree; tensors are not compared, a device might have to be awaited."""
    return not isinstance(value, Tensor) and not isinstance(other, Tensor) and value == other


def _digest(negative: Mapping[str, Any]) -> str:
    """A negative condition as a short text: plain values, and a hash for tensors."""
    said = []
    for name, value in sorted(negative.items()):
        if isinstance(value, Tensor):
            content = value.detach().cpu().double().contiguous().numpy().tobytes()
            value = hashlib.sha256(content).hexdigest()[:12]
        said.append(f"{name}:{value}")
    return "{" + ", ".join(said) + "}"
