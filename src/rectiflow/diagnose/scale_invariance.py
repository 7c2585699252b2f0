"""Which weights' length does not matter to the loss, and what their growth does to the rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.diagnose.hessian import Hessian
from rectiflow.diagnose.probes import Probe, chunks, mean_loss, rate_of
from rectiflow.errors import positive
from rectiflow.training.figures import curves
from rectiflow.training.report import cell

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Invariance:
    """One weight tensor under the cosine test.

    Attributes:
        kind: "channels" (each row of the first dimension passes), "tensor" (it passes as one
            vector) or "none". Tensors of fewer than two dimensions are not tested: "none".
        by_channel: the largest `|cos|` of a row of the weight and its gradient.
        at_once: `|cos|` of the whole tensor and its gradient.
        norm: length of the weight.
        effective_rate: how far a step turns the weight: learning rate over its squared length, or
            over its length where steps do not shrink with the gradient, as Adam's.
    """

    kind: str
    by_channel: float
    at_once: float
    norm: float
    effective_rate: float | None


@torch.no_grad()
def invariance_report(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    delta: float = 0.1,
    learning_rate: float | None = None,
    adaptive: bool = False,
) -> dict[str, Invariance]:
    """What `AdamP` and `SGDP` would take for scale-invariant: weights orthogonal to their gradient.

    A weight in front of a normalisation changes nothing by its length, so its gradient is
    orthogonal to it. It passes where `|cos| < delta / sqrt(dim)`. A tensor without any gradient
    passes as well. The gradient must be taken with batch statistics in training mode: with running
    statistics nothing is scale-invariant.

    Args:
        weights: name to weight.
        gradients: name to gradient.
        delta: how orthogonal they must be.
        learning_rate: for the effective rate.
        adaptive: the rate is that of Adam or its like.

    Returns:
        a record a weight.

    Raises:
        ValueError: weights without gradients, a negative delta.

    Example:
        >>> w = {"in front of a norm": torch.eye(2), "head": torch.eye(2)}
        >>> g = {"in front of a norm": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "head": torch.eye(2)}
        >>> [(name, found.kind) for name, found in invariance_report(w, g).items()]
        [('in front of a norm', 'channels'), ('head', 'none')]

    Source: arXiv 2006.08217, section 3 and algorithm 2.
    """
    positive("delta", delta, zero=True)
    missing = [name for name in weights if name not in gradients]
    if missing:
        raise ValueError(f"each weight needs a gradient, got none for {missing[0]!r}")
    return {
        name: _tested(weight.detach(), gradients[name], delta, learning_rate, 2 - adaptive)
        for name, weight in weights.items()
    }


def _tested(
    weight: Tensor, gradient: Tensor, delta: float, rate: float | None, power: int
) -> Invariance:
    norm = float(weight.norm())
    at_once = float(_cosines(weight.reshape(1, -1), gradient.reshape(1, -1)))
    if weight.ndim < 2 or not weight.numel():
        by_channel, kind = at_once, "none"
    else:
        rows = weight.flatten(1)
        by_channel = float(_cosines(rows, gradient.flatten(1)).max())
        if by_channel < delta / rows.shape[1] ** 0.5:
            kind = "channels"
        elif at_once < delta / weight.numel() ** 0.5:
            kind = "tensor"
        else:
            kind = "none"
    turning = rate / norm**power if rate is not None and norm else None
    return Invariance(kind, by_channel, at_once, norm, turning)


def _adaptive(optimizer: Any) -> bool:
    """Whether steps do not shrink with the gradient: what it is divided by has an eps, or betas."""
    return optimizer is not None and not {"betas", "eps"}.isdisjoint(optimizer.param_groups[0])


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """`|cos|` row by row, 0 for rows of zeros."""
    lengths = a.norm(dim=1).clamp(min=1e-8) * b.norm(dim=1).clamp(min=1e-8)
    return (a * b).sum(1).abs() / lengths


@dataclass(frozen=True)
class InvarianceReport:
    """All weights at one step.

    Attributes:
        step: number of the step.
        weights: name to its test.
    """

    step: int
    weights: Mapping[str, Invariance]


class ScaleInvariance:
    """Reports which weights are scale-invariant during training, and how they grow.

    Where such weights grow, their effective learning rate falls with the square; `AdamP` and `SGDP`
    prevent it. Call `observe` after every training step. It changes nothing in the training.

    Args:
        probe: the samples over which the gradient is taken, in training mode as far as batch
            normalisation goes.
        every: steps between reports.
        delta: see `invariance_report`.
        batch_size: samples of the probe at once, which is what batch normalisation sees; all by
            default.

    Raises:
        ValueError: numbers that are not positive.

    Source: arXiv 2006.08217, figure 3.
    """

    name: ClassVar[str] = "scale-invariance"

    def __init__(
        self, probe: Probe, *, every: int = 100, delta: float = 0.1, batch_size: int | None = None
    ) -> None:
        positive("every", every)
        positive("delta", delta)
        self.probe, self.every, self.delta, self.batch_size = probe, every, delta, batch_size

    def observe(self, step: int, optimizer: Any = None) -> InvarianceReport | None:
        """Look at the model after a training step; returns a report every so many steps."""
        if step % self.every:
            return None
        model = self.probe.model
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        batches = chunks(self.probe, self.batch_size)
        hessian = Hessian(
            mean_loss(self.probe, batches),
            weights.values(),
            batches,
            module=model,
            batch_statistics=True,
        )
        gradients = dict(zip(weights, hessian.unflatten(hessian.gradient())))
        found = invariance_report(
            weights,
            gradients,
            delta=self.delta,
            learning_rate=rate_of(optimizer),
            adaptive=_adaptive(optimizer),
        )
        return InvarianceReport(step, found)

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plot the lengths of weights that pass the test in most reports; file to caption."""
        if not rows:
            return {}
        tables = [row["weights"] for row in rows]
        passed = [
            name
            for name in tables[-1]
            if 2 * sum(table[name]["kind"] != "none" for table in tables) > len(tables)
        ]
        if not passed:
            return {}
        steps = [row["step"] for row in rows]
        drawn = curves(
            {name: (steps, [table[name]["norm"] for table in tables]) for name in passed},
            folder / "scale-invariance.png",
            across="training step",
            up="length of the weight",
        )
        most = max(tables[-1][name]["norm"] / (tables[0][name]["norm"] or 1.0) for name in passed)
        return {
            drawn: f"Lengths of the {len(passed)} of {len(tables[-1])} weights that are "
            f"scale-invariant in most of {len(tables)} reports; the largest growth is to "
            f"{cell(most)} times."
        }
