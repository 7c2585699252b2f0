"""Concepts of different views drawn to the same places, by the attention that they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.guidance.attention_maps import text_attention
from rectiflow.guidance.costs import Cost, Custom, StateCost
from rectiflow.guidance.multi_view import MultiViewField

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.integration import Step


def overlap(maps: Float[Tensor, "views b h w"]) -> Float[Tensor, "pairs b"]:
    """How far the maps of each pair of views cover the same places, from 0 to 1/2.

    `sum min(a, b) / sum (a + b)`: 1/2 for maps that are the same, 0 for those that never meet.

    Example:
        >>> a = torch.tensor([[[1.0, 0.0]]])
        >>> overlap(torch.stack([a, a])), overlap(torch.stack([a, a.flip(-1)]))
        (tensor([[0.5000]]), tensor([[0.]]))

    Source: arXiv 2412.02693, section 3 (anti-segregation).
    """
    flat = maps.flatten(2)
    found = []
    for i, j in combinations(range(len(maps)), 2):
        total = (flat[i] + flat[j]).sum(1)
        shared = torch.minimum(flat[i], flat[j]).sum(1)
        found.append(shared / total.clamp(min=torch.finfo(total.dtype).tiny))
    return torch.stack(found)


def segregation(
    maps: Float[Tensor, "views b h w"], *, target: float | None = None
) -> Float[Tensor, " b"]:
    """How far the overlap of pairs is from what is wanted: the mean of `|target - overlap|`.

    Args:
        maps: attention to the concept of each view, brought back from the view.
        target: the overlap wanted; `0.5 - 0.05 (views - 1)` by default, as concepts that share
            every place in every view leave no room to differ.

    Source: arXiv 2412.02693, section 3. Beyond the target the gradient points the other way.
    """
    wanted = 0.5 - 0.05 * (len(maps) - 1) if target is None else target
    return (wanted - overlap(maps)).abs().mean(0)


@dataclass(frozen=True, eq=False)
class AntiSegregation(StateCost):
    """A cost of concepts that keep to different places, for `FlowChef` under a `MultiViewField`.

    A sampler may satisfy two views by drawing each concept somewhere else. For every view the
    network is asked about the state under that view's condition, without guidance; its attention
    to the tokens of the concept is brought back from the view, and the maps of all views are
    compared (`segregation`). This is done in the correction only, which costs one evaluation with
    gradient for each view.

        FlowChef(AntiSegregation(spans), step_size=5.0, until=0.86)

    Of 30 equal steps these are the first 26.

    Args:
        spans: for each view the positions of its concept among the tokens of the text
            (`interop.diffusers.concept_tokens`).
        side: maps with so many rows are added up; by default those of half the height of the
            state, or the finest there are.
        target: see `segregation`.

    Raises:
        ValueError: fewer than two spans or an empty one; when it is followed, another field, a
            network without attention to text, positions or a side that it does not have.

    Source: arXiv 2412.02693, section 3 and its released code (step 5, 26 of 30 steps, side 32).
    """

    spans: Sequence[Sequence[int]]
    side: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        if len(self.spans) < 2 or not all(self.spans):
            raise ValueError(
                "anti-segregation compares the concepts of two or more views: give the tokens of "
                f"each, got {[list(span) for span in self.spans]}"
            )

    def at(self, step: Step) -> Cost:
        field, time = step.field, step.next_time

        def cost(x: Tensor) -> Tensor:
            dtype = torch.promote_types(x.dtype, torch.float32)
            t = torch.full((len(x),), time, dtype=dtype, device=x.device)
            return segregation(self.maps(field, x, t, **step.condition), target=self.target)

        return Custom(cost)

    def maps(
        self, field: Any, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "views b h w"]:
        """Attention to the concept of each view at each place of the state.

        Args:
            field: a `MultiViewField`, or a field around one.
            x: the state.
            t: its time.
            condition: what all views share.
        """
        views = _views_of(field)
        if len(views.views) != len(self.spans):
            raise ValueError(
                f"there are {len(views.views)} views and {len(self.spans)} spans of tokens: give "
                "one for each view"
            )
        model = _innermost(views)
        found = []
        for (view, _), given, span in zip(views.views, views.conditions(x, condition), self.spans):
            with text_attention(model) as maps:
                model.velocity(view.apply(x), t, **given)
            one = self._of_concept(maps, span, tuple(x.shape[-2:]))
            found.append(view.places.inverse(one))
        return torch.stack(found)

    def _of_concept(self, maps: list[Tensor], span: Sequence[int], shape: Any) -> Tensor:
        """Maps of the chosen side, added over layers and tokens, at the size of the state."""
        chosen = _chosen(maps, shape, self.side)
        tokens = chosen[0].shape[2]
        if not 0 <= min(span) <= max(span) < tokens:
            raise ValueError(
                f"the text has {tokens} tokens, numbered from 0, got positions {list(span)}"
            )
        total = torch.stack(chosen).sum(0)[..., list(span)].sum(2)
        rows = _rows(total.shape[1], shape)
        grid = total.unflatten(1, (rows, -1))[:, None]
        return functional.interpolate(grid, size=shape, mode="nearest")[:, 0]


class OverlapMeter:
    """A corrector that changes nothing and measures the overlap of concepts in the last step.

    Args:
        cost: how the maps are made.

    Attributes:
        overlap: of each pair of views, `(pairs, b)`, where the last step of a sampling began.
    """

    def __init__(self, cost: AntiSegregation) -> None:
        self.cost = cost
        self.overlap: Tensor | None = None

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        if step.next_time >= 1:
            x = step.before
            t = torch.full((len(x),), step.time, device=x.device)
            self.overlap = overlap(self.cost.maps(step.field, x, t, **step.condition))
        return step.after


def _chosen(maps: list[Tensor], shape: tuple[int, int], side: int | None) -> list[Tensor]:
    """The maps that have so many rows."""
    sides = {_rows(one.shape[1], shape) for one in maps}
    wanted = side if side is not None else shape[0] // 2
    if wanted not in sides:
        if side is not None:
            known = ", ".join(map(str, sorted(sides)))
            raise ValueError(f"there is no attention map with {side} rows: there are {known}")
        wanted = max(sides)
    return [one for one in maps if _rows(one.shape[1], shape) == wanted]


def _rows(places: int, shape: tuple[int, int]) -> int:
    """The rows of a map with so many places, on a state of a height and a width."""
    return round((places * shape[0] / shape[1]) ** 0.5)


def _views_of(field: Any) -> MultiViewField:
    while field is not None and not isinstance(field, MultiViewField):
        field = getattr(field, "field", None)
    if field is None:
        raise ValueError(
            "anti-segregation compares views: follow a MultiViewField, or guidance around one"
        )
    return field


def _innermost(field: Any) -> Any:
    """The model that guidance and views are around."""
    while hasattr(field, "field"):
        field = field.field
    if not isinstance(field, nn.Module):
        raise ValueError(
            f"a {type(field).__name__} shows no attention: anti-segregation needs a FlowModel"
        )
    return field
