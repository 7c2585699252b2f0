"""Flow matching: regress a network on the velocities (or noises, or data) of paired samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rectiflow.flows.couplings import Coupling, Draw, Pairs
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.premetrics import L2, Premetric, Regression
from rectiflow.flows.times import TimeSampler, Uniform
from rectiflow.flows.u_shaped import warn_if_independent
from rectiflow.optim.curvature import sampled_squared_error
from rectiflow.training.method import Phase


@dataclass(frozen=True)
class FlowMatching:
    """Train a flow on a coupling: `min E premetric(net(x_t, t), wanted)` with `x_t` on the path.

    With independent pairs this is the first rectified flow; with pairs made by a flow it is
    reflow; at t = 0 alone it is one-step distillation.

    Args:
        model: the model to train; its path and prediction say what is regressed on what.
        coupling: where pairs come from.
        times: which times are looked at.
        premetric: how far a prediction is from what was wanted.
        condition_dropout: share of samples trained on the null condition, for guidance.

    Raises:
        ValueError: a dropout outside [0, 1].

    Source: arXiv 2209.03003, equation 1 and algorithm 1.
    """

    model: FlowModel
    coupling: Coupling
    times: TimeSampler = field(default_factory=Uniform)
    premetric: Premetric = field(default_factory=L2)
    condition_dropout: float = 0.0
    name: str = "flow"

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}")
        warn_if_independent(self.times, self.coupling)

    def phases(self) -> list[Phase]:
        """The one phase."""
        sampled = self.sampled_loss if isinstance(self.premetric, L2) else None
        return [Phase(self.name, self.model, self.loss, inspect=self.inspect, sampled=sampled)]

    def losses(self, pairs: Pairs, t: Tensor, condition: dict[str, Any]) -> Tensor:
        """The loss of each pair at its time, shape `(b,)`."""
        path = self.model.path
        x = path.interpolate(pairs.source, pairs.target, t)
        wanted = path.target_of(self.model.prediction, pairs.source, pairs.target, t)
        output = self.model(x, t, **condition).to(x.dtype)
        return self.premetric(
            Regression(output, wanted, x, t, pairs.target, path, self.model.prediction)
        )

    def loss(self, draw: Draw) -> Tensor:
        """The mean loss of the draw's rows."""
        pairs, t, condition = self._timed(draw)
        return self.losses(pairs, t, condition).mean()

    def sampled_loss(self, draw: Draw) -> tuple[Tensor, int]:
        """The mean squared error against targets drawn around the model's own outputs."""
        pairs, t, condition = self._timed(draw)
        x = self.model.path.interpolate(pairs.source, pairs.target, t)
        output = self.model(x, t, **condition).to(x.dtype)
        return sampled_squared_error(output, noise=draw.normal(output.shape[1:]))

    def _timed(self, draw: Draw) -> tuple[Pairs, Tensor, dict[str, Any]]:
        """The draw's pairs, their times and conditions."""
        pairs = self.coupling.draw(draw)
        t = self.times.sample(draw.size, generator=draw.generator)[draw.part]
        return pairs, t.to(pairs.target.dtype), self._dropped(pairs.condition, draw)

    def inspect(self, draw: Draw) -> str:
        """What is wrong with the pairs of a draw, or an empty string."""
        pairs = self.coupling.draw(draw)
        bad = ~(
            pairs.target.flatten(1).isfinite().all(1) & pairs.source.flatten(1).isfinite().all(1)
        )
        count = int(bad.sum())
        return f"{count} of its {bad.numel()} pairs hold NaN or infinity" if count else ""

    def _dropped(self, condition: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """The condition with some rows replaced by the null condition."""
        if not self.condition_dropout or not condition:
            return condition
        dropped = draw.uniform() < self.condition_dropout
        null = self.model.null_condition(**condition)
        mixed = {}
        for name, value in condition.items():
            rows = dropped.reshape(-1, *(1,) * (value.ndim - 1))
            mixed[name] = torch.where(rows, null[name], value)
        return mixed
