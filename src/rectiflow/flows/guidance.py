"""Guided fields: a conditional field pushed away from what it says under the null condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.guided import (
    VIEWS,
    AgainstNull,
    Guided,
    both_branches,
    null_of,
    rows_of,
    surely_none,
    toward,
)
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from rectiflow.flows.fields import Field


@dataclass(frozen=True, eq=False)
class ClassifierFreeGuidance(AgainstNull):
    """Classifier-free guidance: past the conditional field, away from the null one.

    `v = v_null + scale (v_condition - v_null)`. Scale 1 is the conditional field itself and costs
    one evaluation, as do scale 0 (the null condition) and times outside the interval on a CPU. An
    accelerator is never asked what time it is, since the answer would have to be awaited: there
    the interval is a weight and costs both evaluations. The field must have been trained with
    `condition_dropout`, or its null condition means nothing. It is a field, so solvers,
    `LivePairs(guided=...)` and `generate_pairs(field=...)` take it in place of the model.

    Args:
        field: the conditional field, with a `null_condition`.
        scale: strength, >= 0. Class-conditional models take 1 to 4, text-conditional 3 to 8.
        negative: what to guide away from in place of the null condition, by the names of the
            condition: a value, one row, or one row a sample. Names left out stay null.
        start: the first time (0 is noise) at which guidance applies.
        stop: the last time at which it applies; outside, the field is the conditional one.
        batched: evaluate both branches in one call on a batch of twice the size. Off, two calls
            take half the memory; `benchmarks/guidance.py` times both.
        rescale: share, 0 to 1, by which each sample of the guided prediction is brought back to
            the standard deviation of the conditional one, in what the network predicts. 0.7 keeps
            large scales from overexposing.

    Raises:
        ValueError: a negative or non-finite scale, a share outside [0, 1], times out of order;
            when evaluated, a negative condition that does not fit; in `integrate`, no condition
            at all.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x, t, *, label):
        ...         return x * 0 + label[:, None]
        ...     def null_condition(self, *, label):
        ...         return {"label": torch.zeros_like(label)}
        >>> guided = ClassifierFreeGuidance(FlowModel(Net()), 3.0)
        >>> guided.velocity(torch.ones(1, 2), torch.zeros(1), label=torch.tensor([2]))
        tensor([[6., 6.]])

    Source: Ho and Salimans 2022 (2207.12598), equation 6, with scale = 1 + w; in terms of
        velocities as in arXiv 2403.03206. The interval: arXiv 2404.07724; rescaling: arXiv
        2305.08891, section 3.4.
    """

    rescale: float = attribute(default=0.0, kw_only=True)
    # Stores of pairs made before the class had its present name keep their meaning.
    recorded_as: ClassVar[str] = "ClassifierFree"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {self.rescale}")

    def _guided(
        self,
        view: str,
        x: Tensor,
        t: Tensor,
        condition: dict[str, Any],
        null: dict[str, Any],
        inside: Tensor | None,
    ) -> Tensor:
        if self.scale == 0 and inside is None:
            return getattr(self.field, view)(x, t, **null)
        pair = both_branches(self.field, view, x, t, condition, null, batched=self.batched)
        guided = toward(*pair, self.scale, inside)
        return self._rescaled(view, guided, pair[0], x, t) if self.rescale else guided

    def _rescaled(
        self, view: str, guided: Tensor, conditional: Tensor, x: Tensor, t: Tensor
    ) -> Tensor:
        """A view brought back to the spread of the conditional answer."""
        given, own = VIEWS[view], self.prediction
        said, wanted = (
            self.path.convert(one, x, t, given=given, wanted=own) for one in (guided, conditional)
        )
        spreads = [wide(one).flatten(1).std(1) for one in (wanted, said)]
        factor = torch.lerp(torch.ones_like(t), (spreads[0] / spreads[1]).to(t.dtype), self.rescale)
        return self.path.convert(
            said * rows_of(factor, said).to(said.dtype), x, t, given=own, wanted=given
        )


@dataclass(frozen=True)
class SkipLayers(Guided):
    """Guidance away from the same network with some layers left out, beside the classifier-free.

    `v = v_guided + scale (v_condition - v_skipped)`, where `v_skipped` is the conditional output
    with the layers of `layers` passed over, and `v_guided` the classifier-free field of scale
    `guidance`. It firms up structure (hands, anatomy) where guidance alone does not. It applies
    from time `start` to time `stop` only; outside, and without layers, it is
    `ClassifierFreeGuidance`.

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

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if there is nothing to guide, or the field inside refuses."""
        ClassifierFreeGuidance(self.field, self.guidance).check(x, **condition)

    def _guide(self, view: str, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        inside = (t > self.start) & (t < self.stop)
        if not self.layers or not self.scale or surely_none(inside):
            return getattr(ClassifierFreeGuidance(self.field, self.guidance), view)(
                x, t, **condition
            )
        null = null_of(self.field, condition) if self.guidance != 1 else {}
        if null:
            full = {**condition, **null}
            plain, without = both_branches(self.field, view, x, t, condition, full)
            guided = toward(plain, without, self.guidance, None)
        else:
            plain = guided = getattr(self.field, view)(x, t, **condition)
        skipped = getattr(self.field, view)(x, t, skip_layers=self.layers, **condition)
        weight = rows_of((self.scale * inside).to(x.dtype), x)
        return guided + weight * (plain - skipped)
