"""Pictures that show something else in every view, from a model and what each view should show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.guidance.anti_segregation import AntiSegregation
from rectiflow.guidance.flowchef import FlowChef
from rectiflow.guidance.multi_view import MultiViewField
from rectiflow.guidance.view import View

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.fields import Field, FlowModel
    from rectiflow.flows.integration import Corrector, Step
    from rectiflow.guidance.combination import Balance


@dataclass(frozen=True, eq=False)
class Anagram:
    """Sample pictures that show one thing as they are and others when they are turned.

    It puts the parts together in their order: the model, guidance of each view, the views and
    their combination (`MultiViewField`), the solver, and steering of attention
    (`AntiSegregation`). For anything else take the parts.

    Args:
        model: a conditional model. Models of pixels keep what is asked; latents follow flips and
            turns only about, and permutations hardly.
        views: each view with its condition, see `MultiViewField`.
        guide: makes the guided field of the model, such as `lambda model: APG(model, 7.5)`.
        combine: mean, balanced, min-norm, alternate or sum.
        rectify: none, official or matched.
        balance: what `balanced` goes by.
        steps: number of steps or grid of times.
        solver: see `integrate`; `sde` is the ancestral one.
        spans: tokens of the concept of each view, for anti-segregation.
        antiseg: its step size; 0 for none.
        until: steps that begin later are not corrected by it.

    Raises:
        ValueError: see `MultiViewField`; anti-segregation without spans, a negative step size.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> from rectiflow.guidance.views import Flip, Identity
        >>> from rectiflow.nets import MLP
        >>> model = FlowModel(MLP(shape=(1, 4, 4), width=8, depth=1, classes=10), shape=(1, 4, 4))
        >>> anagram = Anagram(model, [(Identity(), {"label": 3}), (Flip(), {"label": 8})], steps=2)
        >>> anagram(5).shape
        torch.Size([5, 1, 4, 4])

    Source: arXiv 2412.02693 and its base, arXiv 2311.17919.
    """

    model: FlowModel
    views: Sequence[tuple[View, Mapping[str, Any]]]
    guide: Callable[[FlowModel], Field] | None = None
    combine: str = "mean"
    rectify: str = "none"
    balance: Balance | None = None
    steps: int | Sequence[float] = 30
    solver: Any = "euler"
    spans: Sequence[Sequence[int]] | None = None
    antiseg: float = 0.0
    until: float = 0.86

    def __post_init__(self) -> None:
        positive("antiseg", self.antiseg, zero=True)
        if self.antiseg and self.spans is None:
            raise ValueError("antiseg needs spans: the tokens of the concept of each view")
        # Both refuse what cannot be.
        _ = self.field, self.steering

    @property
    def field(self) -> MultiViewField:
        """The field that is followed."""
        inner: Any = self.model if self.guide is None else self.guide(self.model)
        return MultiViewField(
            inner,
            self.views,
            combine=self.combine,
            rectify=self.rectify,
            balance=self.balance,
            steps=self.steps,
        )

    @property
    def steering(self) -> tuple[FlowChef, ...]:
        """What corrects its steps."""
        if not self.antiseg or self.spans is None:
            return ()
        cost = AntiSegregation(self.spans)
        return (FlowChef(cost, step_size=self.antiseg, until=self.until),)

    def __call__(
        self,
        count: int | None = None,
        *,
        source: Float[Tensor, "b *dims"] | None = None,
        correctors: Sequence[Corrector] = (),
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "b *dims"]:
        """Samples, as the view of the identity shows them.

        Args:
            count: how many; taken from `source` when that is given.
            source: the noises to start from.
            correctors: called after its own, see `integrate`.
            generator: the source of randomness.
            progress: called with the number of steps done.
        """

        def after(step: Step) -> Tensor:
            if progress is not None:
                progress(step.index + 1)
            return step.after

        if source is None and count is not None:
            source = draw_source(self.model, count, generator=generator)
        return sample(
            self.model,
            count,
            source=source,
            steps=self.steps,
            solver=self.solver,
            field=self.field,
            correctors=(*self.steering, *correctors, after),
            # Conditions may have a row for each sample, so the batch is not cut.
            batch_size=1 if source is None else len(source),
            generator=generator,
        )

    def shown(self, images: Float[Tensor, "b *dims"]) -> list[Tensor]:
        """What every view shows of samples; for a sum, its parts."""
        if self.combine == "sum":
            return [view.inverse(images) for view, _ in self.views]
        return [view.apply(images) for view, _ in self.views]
