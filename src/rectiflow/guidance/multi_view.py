"""One field of several views of a state, each under a condition of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import unknown
from rectiflow.flows.guided import VIEWS, Guided, begun, has_rows, refuse_memory
from rectiflow.flows.integration import time_grid
from rectiflow.flows.paths import TINY, expand
from rectiflow.guidance.apg import SAME_TIME
from rectiflow.guidance.combination import REPAIRS, Balance, min_norm_weights, rectified
from rectiflow.guidance.view import View, assert_orthogonal
from rectiflow.vectors import combine

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from rectiflow.flows.fields import Field

RULES = ("mean", "alternate", "sum", "balanced", "min-norm")


@dataclass(frozen=True, eq=False)
class MultiViewField(Guided):
    """A field whose samples show one thing as they are and another when they are turned.

    The field inside is asked about every view of the state under the condition of that view; its
    answers are brought back and combined. It is a field, so every solver, corrector and path takes
    it. Guidance belongs inside, `MultiViewField(APG(model, 7.5), views)`, so that each view is
    guided for itself and has its own momentum; all views go through the network in one batch where
    their conditions have the same form.

    Conditions are given here and not when sampling; what is given there is shared by all views.

    Combinations: `mean`; `balanced`, a mean with weights by how well each view shows its
    condition; `min-norm`, the mean of noises that is shortest; `alternate`, one view a step in
    turn, at the price of one; `sum`, for parts that add up to the picture (`views.Part`). A mean
    and a sum are the same whether velocities, noises or data are combined. Whose turn it is follows
    from the time, so views alternate under solvers that do not look at the end of a step (euler,
    midpoint, sde); others refuse.

    Averaged noises have too little variance, which `rectify` repairs in terms of noises, see
    `rectified`. Predictions of good models under an ODE solver need no repair; it was made for
    pixel models under ancestral samplers and large guidance. Where the path has no data yet
    (alpha = 0, the start) all views see the same noise and nothing is repaired.

    Args:
        field: the conditional field, guided if wanted.
        views: each view with its condition: by name a number, one row, or one row a sample.
        combine: mean, balanced, min-norm, alternate or sum.
        rectify: none, official or matched.
        balance: what `balanced` goes by.
        steps: the number of steps or the grid of times that is sampled with: `alternate` needs it,
            falling where times fall, and `balanced` takes the share of steps done from it in place
            of the time.
        batched: ask about all views in one call; off, one call a view takes less memory.

    Raises:
        ValueError: no views, unknown names, settings without effect, alternation of a field with
            momentum; when it is followed, a view that is not orthogonal on such samples, parts that
            do not add up, conditions of other rows than the samples, alternation by a solver that
            looks at the end of a step.

    Example:
        >>> from rectiflow.flows import FlowModel, integrate
        >>> from rectiflow.guidance.views import Flip, Identity
        >>> model = FlowModel(lambda x, t, label: label[:, None, None, None] - x)
        >>> field = MultiViewField(model, [(Identity(), {"label": 1}), (Flip(), {"label": 3})])
        >>> integrate(field, torch.zeros(1, 1, 2, 1), 1).flatten()
        tensor([2., 2.])

    Source: arXiv 2311.17919 (views, mean, alternation), arXiv 2404.11615 (sums of parts), arXiv
        2412.02693 (balance and rectification).
    """

    field: Field
    views: Sequence[tuple[View, Mapping[str, Any]]]
    combine: str = dataclasses.field(default="mean", kw_only=True)
    rectify: str = dataclasses.field(default="none", kw_only=True)
    balance: Balance | None = dataclasses.field(default=None, kw_only=True)
    steps: int | Sequence[float] | None = dataclasses.field(default=None, kw_only=True)
    batched: bool = dataclasses.field(default=True, kw_only=True)
    _begun: tuple[Any, ...] = dataclasses.field(default=(), kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        if not self.views:
            raise ValueError("there are no views: give one or more, each with its condition")
        if self.combine not in RULES:
            raise unknown("combination", self.combine, RULES)
        if self.rectify not in REPAIRS:
            raise unknown("rectification", self.rectify, REPAIRS)
        if self.rectify != "none" and self.combine in ("alternate", "sum"):
            raise ValueError(
                f"combine={self.combine!r} takes no mean that could lose variance: use "
                "rectify='none'"
            )
        if (self.balance is None) == (self.combine == "balanced"):
            raise ValueError(
                f"combine={self.combine!r} with balance={self.balance!r}: balanced views need a "
                "Balance, others take none"
            )
        if self.steps is not None:
            time_grid(self.steps)
        if self.combine == "alternate":
            if self.steps is None:
                raise ValueError("alternate goes by steps: give steps= as when sampling")
            refuse_memory(self.field, "alternating views are not asked about at every step")

    @property
    def alternates(self) -> bool:
        """Whether views take turns, here or in the field inside."""
        return self.combine == "alternate" or super().alternates

    def begin(self) -> Any:
        """The field for one trajectory, with a memory for each view."""
        inner = tuple(begun(self.field) for _ in self.views)
        return self if inner[0] is self.field else dataclasses.replace(self, _begun=inner)

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if the views do not fit the states, or the field inside refuses."""
        shape = tuple(x.shape[1:])
        if self.combine == "sum":
            self._check_sum(shape)
        else:
            for view, _ in self.views:
                assert_orthogonal(view, shape)
        for row in self.conditions(x, condition):
            super().check(x, **row)

    def conditions(self, x: Tensor, condition: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The condition of every view for a batch, with what is given for all of them."""
        return [
            {**condition, **{name: _rows(name, value, x) for name, value in own.items()}}
            for _, own in self.views
        ]

    def _guide(self, member: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        shown = [view.apply(x) for view, _ in self.views]
        given = self.conditions(x, condition)
        if self.combine == "alternate":
            return self._in_turn(member, shown, t, given)
        if self.combine == "sum":
            return self._answers(member, shown, t, given).sum(0)
        if self.combine == "mean" and self.rectify == "none":
            return combine(self._answers(member, shown, t, given))
        # A velocity says all there is to know at every time; noises and data do not at the ends.
        velocities = self._answers("velocity", shown, t, given)
        noises = torch.stack([self._convert(v, x, t, "noise") for v in velocities])
        weights: Tensor | None = None
        if self.combine == "min-norm":
            weights = min_norm_weights(noises)
        elif self.balance is not None:
            pictures = shown
            if self.balance.on == "data":
                data = self._convert(combine(velocities), x, t, "data")
                pictures = [view.apply(data) for view, _ in self.views]
            weights = self.balance.weights(pictures, t, given, self._share(t))
        velocity = combine(velocities, weights)
        if self.rectify != "none":
            added = rectified(noises, weights, self.rectify) - combine(noises, weights)
            velocity = velocity + (self._slope(t, x) * added).to(velocity.dtype)
        return self._convert(velocity, x, t, VIEWS[member])

    def _answers(
        self, member: str, shown: list[Tensor], t: Tensor, given: list[dict[str, Any]]
    ) -> Tensor:
        """What the field says in every view, brought back, `(views, b, ...)`."""
        fields = self._begun or (self.field,) * len(self.views)
        if self.batched and _alike(given):
            together = {
                name: torch.cat([one[name] for one in given]) if has_rows(value) else value
                for name, value in given[0].items()
            }
            times = t.repeat(len(shown))
            said = getattr(fields[0], member)(torch.cat(shown), times, **together)
            answers = said.chunk(len(shown))
        else:
            answers = tuple(
                getattr(field, member)(state, t, **one)
                for field, state, one in zip(fields, shown, given)
            )
        return torch.stack([view.inverse(one) for (view, _), one in zip(self.views, answers)])

    def _in_turn(
        self, member: str, shown: list[Tensor], t: Tensor, given: list[dict[str, Any]]
    ) -> Tensor:
        """What the field says of the one view whose turn it is, sample by sample."""
        if not _alike(given):
            raise ValueError(
                "alternating views need conditions of the same names and shapes, got "
                + " and ".join(", ".join(one) or "none" for one in given)
            )
        assert self.steps is not None
        turn = _number(t, time_grid(self.steps)) % len(shown)
        place = turn, torch.arange(len(t), device=t.device)
        one = {
            name: torch.stack([of[name] for of in given])[place] if has_rows(value) else value
            for name, value in given[0].items()
        }
        said = getattr(self.field, member)(torch.stack(shown)[place], t, **one)
        return torch.stack([view.inverse(said) for view, _ in self.views])[place]

    def _share(self, t: Tensor) -> Float[Tensor, " b"]:
        """The share of the steps toward the data that is done."""
        if self.steps is None:
            return t
        grid = sorted(time_grid(self.steps))
        return _number(t, grid) / (len(grid) - 1)

    def _slope(self, t: Tensor, x: Tensor) -> Tensor:
        """How the velocity moves with the noise at a fixed state; 0 where there are no data yet."""
        one = torch.ones_like(t)
        slope = self.path.convert(one, 0 * one, t, given="noise", wanted="velocity")
        return expand(torch.where(self.path.alpha(t) > TINY, slope, 0.0), x)

    def _convert(self, velocity: Tensor, x: Tensor, t: Tensor, wanted: str) -> Tensor:
        return self.path.convert(velocity, x, t, given="velocity", wanted=wanted)

    def _check_sum(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        total = torch.stack([view.inverse(view.apply(x)) for view, _ in self.views]).sum(0)
        if not torch.allclose(total, x, rtol=1e-4, atol=1e-4):
            raise ValueError(
                "with combine='sum' the parts must add up to the picture, and these differ from "
                f"it by up to {float((total - x).abs().max()):.3g}: give views.Rest of the others "
                "as the last part"
            )


def _number(t: Tensor, grid: Sequence[float]) -> Int[Tensor, " b"]:
    """The number of the step that begins at a time or has it inside."""
    forward = 1 if grid[0] < grid[-1] else -1
    starts = torch.tensor([forward * time for time in grid], device=t.device, dtype=t.dtype)
    number = torch.bucketize(forward * t + SAME_TIME, starts, right=True) - 1
    return number.clamp(0, len(grid) - 2)


def _rows(name: str, value: Any, x: Tensor) -> Any:
    """A value of a condition with one row a sample."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return value
    rows = torch.as_tensor(value, device=x.device)
    if not isinstance(value, Tensor) and rows.is_floating_point():
        rows = rows.to(torch.float32)
    if rows.ndim == 0 or len(rows) == 1:
        return rows.expand(len(x), *rows.shape[1:])
    if len(rows) != len(x):
        raise ValueError(
            f"the condition {name!r} of a view must have one row, or one for each of the {len(x)} "
            f"samples, got shape {tuple(rows.shape)}"
        )
    return rows


def _alike(given: Sequence[Mapping[str, Any]]) -> bool:
    """Whether conditions can stand in one batch."""
    first = given[0]
    for one in given[1:]:
        if one.keys() != first.keys():
            return False
        for name, value in one.items():
            other = first[name]
            if has_rows(value) and has_rows(other):
                if value.shape != other.shape or value.dtype != other.dtype:
                    return False
            elif isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
                return False
    return True
