"""Generators of few steps while they are trained: what they are fed, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.flows.couplings import Coupling, Draw, Pairs
from rectiflow.flows.fields import FlowModel, evaluating
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.times import Discrete

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Given:
    """What a training step draws for a generator's samples.

    Attributes:
        real: real data with their conditions, if there are any.
        source: noises that the generator starts from.
        noise: noises to put on its samples.
        chosen: which of its steps each row takes; None for a generator of one step.
        fresh: noises between the steps of a simulation.
    """

    real: Pairs | None
    source: Tensor
    noise: Tensor
    chosen: Tensor | None
    fresh: list[Tensor]

    @property
    def condition(self) -> dict[str, Any]:
        """The conditions of the real data, which the generator's samples share."""
        return self.real.condition if self.real is not None else {}


@dataclass(frozen=True, eq=False)
class FewSteps:
    """A model as a generator that steps from noise to data at given times.

    At each of its times it estimates the data; between them fresh noise is added (`Renoise`
    samples it). Training looks at one of its steps at a time: the first starts from noise, a later
    one from real data with noise on them, or from the generator's own earlier steps.

    Args:
        model: the model, on any path.
        starts: the times at which its steps start.
        simulate: whether later steps are fed by the generator's own earlier ones.
        data: real data and conditions, if there are any.

    Source: arXiv 2502.15681, official code (noised data); arXiv 2405.14867, section 4.5 (own
        earlier steps).
    """

    model: FlowModel
    starts: tuple[float, ...] = (0.0,)
    simulate: bool = False
    data: Coupling | None = None
    _made: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def given(self, draw: Draw) -> Given:
        """Everything random about the samples of a draw, in one order for all that need them."""
        real = self.data.draw(draw) if self.data is not None else None
        shape, count = self.model.shape, len(self.starts)
        assert shape is not None
        source, noise = draw.normal(shape), draw.normal(shape)
        chosen = (draw.uniform() * count).long() if count > 1 else None
        fresh = [draw.normal(shape) for _ in self.starts[1:]] if self.simulate else []
        return Given(real, source, noise, chosen, fresh)

    def draw(self, draw: Draw) -> Pairs:
        """Fresh noise beside the generator's samples: a coupling to fit another flow to them."""
        given = self.given(draw)
        return Pairs(given.noise, self.samples(draw, given), given.condition)

    def samples(self, draw: Draw, given: Given) -> Float[Tensor, "b *dims"]:
        """The samples of a draw without a gradient, made once for all phases of a step."""
        # Optimizers write to weights in place, which raises their version.
        version = sum(p._version for p in self.model.parameters())
        step = (draw.step, draw.seed, draw.size, version)
        key = (*step, draw.part.start, draw.part.stop)
        if key not in self._made:
            for old in [k for k in self._made if k[: len(step)] != step]:
                del self._made[old]
            with torch.no_grad(), evaluating(self.model):
                self._made[key] = self.generate(given)
        return self._made[key]

    def generate(self, given: Given) -> Float[Tensor, "b *dims"]:
        """Estimates of the data at each row's chosen step, with a gradient to that step alone."""
        path, source, chosen = self.model.path, given.source, given.chosen
        x, t = path.start(source), source.new_zeros(source.shape[0])
        if chosen is not None:
            t = torch.tensor(self.starts, dtype=t.dtype, device=t.device)[chosen]
            if self.simulate:
                x = self._simulated(given, x, chosen)
            else:
                assert given.real is not None
                noised = path.interpolate(source, given.real.target, t)
                x = torch.where(_rows(chosen == 0, x), x, noised)
        return self.model.denoise(x, t, **given.condition)

    @torch.no_grad()
    def _simulated(self, given: Given, x: Tensor, chosen: Tensor) -> Tensor:
        """Each row's state at its chosen step, reached by the steps before."""
        kept = x
        with evaluating(self.model):
            for index, noise in enumerate(given.fresh, 1):
                t = x.new_full((x.shape[0],), self.starts[index - 1])
                data = self.model.denoise(x, t, **given.condition)
                t = torch.full_like(t, self.starts[index])
                x = self.model.path.interpolate(noise, data, t)
                kept = torch.where(_rows(chosen == index, x), x, kept)
        return kept

    @property
    def sampling(self) -> dict[str, Any]:
        """How the finished generator is sampled."""
        if len(self.starts) == 1 and isinstance(self.model.path, RectifiedPath):
            # One Euler step on a straight path is the estimate of the data.
            return {"solver": "euler", "steps": 1, "made_for": 1}
        steps = [*self.starts, 1.0]
        return {"solver": "renoise", "steps": steps, "made_for": len(self.starts)}


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of samples as one that broadcasts over their dimensions."""
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


def start_times(steps: int | Sequence[float]) -> tuple[float, ...]:
    """The times at which a generator's steps start: equally spaced for a number of them.

    Raises:
        ValueError: times that do not start at 0 and rise below 1.

    Example:
        >>> start_times(2), start_times([0, 0.3])
        ((0.0, 0.5), (0.0, 0.3))
    """
    if isinstance(steps, int):
        return tuple(Discrete.grid(steps).times)
    times = tuple(float(t) for t in steps)
    if not times or times[0] != 0 or times[-1] >= 1 or list(times) != sorted(set(times)):
        raise ValueError(f"the student's steps must start at 0 and rise below 1, got {times}")
    return times
