"""Adaptive projected guidance: large scales without burnt colours, by rectifying the direction.

The pure functions work on estimates of the data; `APG` applies them around any field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.guided import AgainstNull, both_branches, rows_of, toward
from rectiflow.flows.paths import TINY, expand
from rectiflow.vectors import clip_norm, split_parallel
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.paths import Path

# Times of a grid that are nearer to each other than this are one time, rounded in two ways.
SAME_TIME = 1e-5


class Projected(NamedTuple):
    """Guided data, and the momentum to hand to the next call."""

    data: Float[Tensor, "b *dims"]
    average: Float[Tensor, "b *dims"]


def rectify(
    difference: Float[Tensor, "b *dims"],
    reference: Float[Tensor, "b *dims"],
    *,
    eta: float = 0.0,
    norm: float | Tensor | None = None,
    per_channel: bool = False,
) -> Float[Tensor, "b *dims"]:
    """A guidance direction, shortened and with its part along the reference damped.

    `d' = d min(1, norm / ||d||)`, then `d'_orthogonal + eta d'_parallel`. The parallel part mostly
    makes the estimate larger (contrast, saturation), the orthogonal one makes it better. With
    eta 1 and no norm it is the difference itself, bit for bit.

    Args:
        difference: conditional minus null estimate, a direction for each sample.
        reference: the conditional estimate.
        eta: weight of the parallel part.
        norm: largest length of the difference, a number or one per vector.
        per_channel: take each channel, not each sample, as one vector.

    Returns:
        the rectified direction in the dtype of `difference`.

    Raises:
        ValueError: the shapes differ, or a negative norm.

    Example:
        >>> rectify(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[3., 0.]])

    Source: arXiv 2410.02416, section 4 and algorithm 1.
    """
    start = 2 if per_channel else 1
    step = wide(difference)
    if norm is not None:
        step = clip_norm(step, norm, start=start)
    if eta != 1:
        step = step - (1 - eta) * split_parallel(step, wide(reference), start=start).parallel
    return step.to(difference.dtype)


def projected_guidance(
    conditional: Float[Tensor, "b *dims"],
    null: Float[Tensor, "b *dims"],
    scale: float,
    *,
    eta: float = 0.0,
    norm: float | None = None,
    momentum: float = 0.0,
    average: Float[Tensor, "b *dims"] | None = None,
    per_channel: bool = False,
) -> Projected:
    """Guided data from two estimates of the data, for loops of your own; `APG` does it in a field.

    `m = D_c - D_u + momentum m_before`, then `D = D_c + (scale - 1) rectify(m, D_c)`. Hand the
    returned average to the next call of the same trajectory, and none to the first.

    Args:
        conditional: estimate of the data under the condition.
        null: estimate under the null condition.
        scale: strength; 1 is the conditional estimate.
        eta: weight of the part along the conditional estimate.
        norm: largest length of the direction, None for any.
        momentum: weight of the earlier differences, below 0 to push away from them.
        average: what the call before returned.
        per_channel: take each channel, not each sample, as one vector.

    Returns:
        the guided estimate, and the new average (float32 at least).

    Raises:
        ValueError: the shapes differ, or a negative norm.

    Example:
        >>> c, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]])
        >>> projected_guidance(c, u, 3.0, eta=1.0).data
        tensor([[3., 2.]])

    Source: arXiv 2410.02416, algorithm 1.
    """
    step = wide(conditional) - wide(null)
    if average is not None:
        step = step + momentum * average
    turned = rectify(step, conditional, eta=eta, norm=norm, per_channel=per_channel)
    return Projected((conditional + (scale - 1) * turned).to(conditional.dtype), step)


@dataclass
class Memory:
    """The momentum of one trajectory, a row for each sample.

    Attributes:
        time: times of the last evaluation.
        before: the average before that time.
        average: the average with it.
    """

    time: Tensor | None = None
    before: Tensor | None = None
    average: Tensor | None = None

    def add(self, difference: Tensor, t: Tensor, momentum: float, counted: Tensor | None) -> Tensor:
        """The average with this difference, which is kept in the rows that are counted."""
        if self.average is None or self.before is None or self.time is None:
            before = torch.zeros_like(difference)
        else:
            moved = (t - self.time).abs() > SAME_TIME
            before = torch.where(rows_of(moved, difference), self.average, self.before)
        found = difference + momentum * before
        if counted is not None:
            counted = rows_of(counted, difference)
            found = torch.where(counted, found, difference)
        self.time, self.before = t, before
        self.average = found if counted is None else torch.where(counted, found, before)
        return found


@dataclass(frozen=True, eq=False)
class APG(AgainstNull):
    """Adaptive projected guidance: classifier-free guidance that large scales do not oversaturate.

    In data space, whatever the model predicts: `D = D_c + (scale - 1) rectify(m, D_c)` with
    `m = (D_c - D_u) + momentum m_before`. It costs no evaluation beyond those of
    `ClassifierFreeGuidance`, and is it bit for bit with `eta=1, momentum=0` and no norm.

    Momentum belongs to a trajectory: `integrate` gives each one a memory of its own (`begin`), so
    nothing leaks from run to run. Called outside a trajectory, every evaluation is a first one.
    Within one, an evaluation at a new time adds to the average, in either direction of time; one
    at the time of the last (the end of a step of Heun's and the start of the next, both middles
    of Runge-Kutta's fourth-order method) replaces it. Adaptive solvers, which take evaluations
    back, compiled samplers and alignment, which run steps apart, refuse a field with momentum.

    Where the path has no noise left (`sigma = 0`, the end at t = 1) the velocity of a momentum is
    not defined: that evaluation goes without momentum and norm, which is the limit of both.

    Args:
        field: the conditional field, with a `null_condition`.
        scale: strength, >= 0; 1 is the conditional field. 4 to 15 where CFG takes 2 to 7.
        eta: weight of the direction's part along the conditional estimate, 0 to 1; 1 is CFG's.
        momentum: weight of earlier differences, in (-1, 1). Negative values push away from them.
        norm: largest length of the direction in units of the data, None for any. It grows with
            the root of the number of elements; `presets` has values per model family.
        rms: give `norm` as a root mean square over the elements, the same for every image size.
        per_channel: take each channel, not each sample, as one vector: another algorithm, used
            for audio.
        negative: see `ClassifierFreeGuidance`.
        start: see there.
        stop: see there.
        batched: see there.

    Raises:
        ValueError: a setting out of its range; otherwise see `ClassifierFreeGuidance`.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x, t, *, label):
        ...         return x + label[:, None] * torch.tensor([1.0, 0.0])
        ...     def null_condition(self, *, label):
        ...         return {"label": torch.zeros_like(label)}
        >>> guided = APG(FlowModel(Net()), 3.0, momentum=0.0)
        >>> x, t = torch.tensor([[0.0, 1.0]]), torch.zeros(1)
        >>> guided.denoise(x, t, label=torch.tensor([2])).round(decimals=4)
        tensor([[4., 0.]])

    Source: arXiv 2410.02416, algorithm 1, which updates the momentum at every call: the same for
        solvers that never look twice at one time. diffusers' guider projects what the model
        predicts, not the data, and by default returns one parallel part less.
    """

    eta: float = dataclasses.field(default=0.0, kw_only=True)
    momentum: float = dataclasses.field(default=-0.5, kw_only=True)
    norm: float | None = dataclasses.field(default=None, kw_only=True)
    rms: bool = dataclasses.field(default=False, kw_only=True)
    per_channel: bool = dataclasses.field(default=False, kw_only=True)
    _memory: Memory | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum must be in (-1, 1), got {self.momentum}")
        if self.norm is not None:
            positive("norm", self.norm)
            if math.isinf(self.norm):
                raise ValueError("norm must be finite, or None for no bound, got inf")
        elif self.rms:
            raise ValueError("rms says how norm is meant, and there is no norm: give norm=")

    @property
    def remembers(self) -> bool:
        """Whether an evaluation depends on earlier ones of the trajectory."""
        return self.momentum != 0 or super().remembers

    @property
    def plain(self) -> bool:
        """Whether the settings are those of classifier-free guidance."""
        return self.eta == 1 and self.momentum == 0 and self.norm is None

    def begin(self) -> Any:
        """The field for one trajectory, with a momentum of its own."""
        found = super().begin()
        return dataclasses.replace(found, _memory=Memory()) if self.momentum else found

    def _guided(
        self,
        view: str,
        x: Tensor,
        t: Tensor,
        condition: dict[str, Any],
        null: Mapping[str, Any],
        inside: Tensor | None,
    ) -> Tensor:
        if view == "noise" and not self.plain:
            # Near t = 0 the data says more about the velocity than about the noise.
            velocity = self._guided("velocity", x, t, condition, null, inside)
            return self.path.convert(velocity, x, t, given="velocity", wanted="noise")
        pair = both_branches(self.field, view, x, t, condition, null, batched=self.batched)
        if self.plain:
            return toward(*pair, self.scale, inside)
        return self._rectified(view, *pair, x, t, inside)

    def _rectified(
        self,
        view: str,
        conditional: Tensor,
        null: Tensor,
        x: Tensor,
        t: Tensor,
        inside: Tensor | None,
    ) -> Tensor:
        """The difference of a view in units of the data, rectified, and back."""
        difference, reference = wide(conditional) - wide(null), conditional
        unit: Tensor | None = None
        free: Tensor | None = None
        if view == "velocity":
            reference = self.path.convert(conditional, x, t, given="velocity", wanted="data")
            unit = data_per_velocity(self.path, x, t)
            free = unit > TINY
            unit = torch.where(free, unit, 1.0).to(difference.dtype)
            difference = difference * unit
        counted = None if free is None else free.flatten()
        if inside is not None:
            counted = inside if counted is None else counted & inside
        if self._memory is not None:
            difference = self._memory.add(difference, t, self.momentum, counted)
        step = rectify(
            difference,
            reference,
            eta=self.eta,
            norm=self._bound(difference, free),
            per_channel=self.per_channel,
        )
        step = (self.scale - 1) * step
        if unit is not None:
            step = step / unit
        if inside is not None:
            step = torch.where(rows_of(inside, step), step, 0.0)
        return (conditional + step).to(conditional.dtype)

    def _bound(self, difference: Tensor, free: Tensor | None) -> Tensor | float | None:
        """The norm of each vector's bound; none where the path has no noise left."""
        if self.norm is None:
            return None
        lead = 2 if self.per_channel else 1
        size = math.prod(difference.shape[lead:])
        norm = self.norm * math.sqrt(size) if self.rms else self.norm
        if free is None:
            return norm
        return torch.where(free.reshape(-1, *(1,) * (lead - 1)), norm, math.inf)


def data_per_velocity(
    path: Path, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *ones"]:
    """By how much the estimate of the data moves with the velocity, at a fixed state and time.

    With `x = alpha D + sigma N` and `v = alpha' D + sigma' N` it is
    `sigma / (alpha' sigma - alpha sigma')`: on straight lines `1 - t`.

    Example:
        >>> from rectiflow.flows import RectifiedPath
        >>> data_per_velocity(RectifiedPath(), torch.ones(1, 2), torch.tensor([0.25]))
        tensor([[0.7500]])
    """
    t = expand(t, x)
    alpha, sigma, dalpha, dsigma = path.alpha(t), path.sigma(t), path.dalpha(t), path.dsigma(t)
    return sigma / (dalpha * sigma - alpha * dsigma).clamp(min=TINY)
