"""Sharpness over a training: of all weights, of each layer, and along the steps taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rectiflow.diagnose.directions import directional_sharpness
from rectiflow.diagnose.eigenpairs import top_eigenpair
from rectiflow.diagnose.hessian import Hessian
from rectiflow.diagnose.probes import Probe, chunks, mean_loss, rate_of, trained
from rectiflow.errors import positive
from rectiflow.training.figures import curves
from rectiflow.training.report import cell

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SharpnessReport:
    """How a probe's mean loss is curved at the weights after a step.

    Attributes:
        step: number of the step.
        loss: the loss.
        gradient_norm: length of its gradient.
        sharpness: largest eigenvalue of its Hessian.
        eta_lambda: learning rate times that; plain descent is stable below 2.
        layers: largest eigenvalue of each layer's block.
        along_step: curvature along the step just taken; None where the weights did not move.
        cosine: of that step's direction and the gradient.
    """

    step: int
    loss: float
    gradient_norm: float
    sharpness: float
    eta_lambda: float | None
    layers: Mapping[str, float]
    along_step: float | None
    cosine: float | None


class Sharpness:
    """Reports the sharpness of a loss during training, and the curvature that its steps meet.

    Where `along_step` is far below `sharpness`, the optimizer avoids the sharp directions, as
    adaptive ones do. Call `observe` after every training step. It changes nothing in the training.

    Args:
        probe: the samples over which the loss is averaged.
        every: steps between reports.
        layers: also look at each layer, which takes some ten Hessian products for each.
        batch_size: samples of the probe at once; all by default.
        batch_statistics: let batch normalisation use the probe's statistics; all samples go at
            once.
        seed: of the first direction.

    Raises:
        ValueError: numbers that are not positive.

    Source: arXiv 2306.00204, section 3; arXiv 2311.04163, section 2.
    """

    name: ClassVar[str] = "sharpness"

    def __init__(
        self,
        probe: Probe,
        *,
        every: int = 100,
        layers: bool = False,
        batch_size: int | None = None,
        batch_statistics: bool = False,
        seed: int = 0,
    ) -> None:
        positive("every", every)
        self.probe, self.every, self.layers, self.seed = probe, every, layers, seed
        self.batch_size = None if batch_statistics else batch_size
        self.batch_statistics = batch_statistics
        self._before: tuple[int, list[Tensor]] | None = None
        self._direction: Tensor | None = None

    def observe(self, step: int, optimizer: Any = None) -> SharpnessReport | None:
        """Look at the model after a training step; returns a report every so many steps.

        None where the loss has no finite gradient: its curvature cannot be had.
        """
        found = self._report(step, rate_of(optimizer)) if step % self.every == 0 else None
        if (step + 1) % self.every == 0:
            self._before = (step, [p.detach().clone() for p in trained(self.probe)])
        return found

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plots of sharpness and of its layers; file to caption."""
        if not rows:
            return {}
        steps = [row["step"] for row in rows]
        lines = {"sharpest direction": (steps, [row["sharpness"] for row in rows])}
        met = [row for row in rows if row["along_step"] is not None]
        if met:
            lines["along the step"] = ([r["step"] for r in met], [r["along_step"] for r in met])
        whole = curves(
            lines,
            folder / "sharpness.png",
            across="training step",
            up="curvature of the loss",
        )
        values = lines["sharpest direction"][1]
        pictures = {
            whole: f"Curvature of the loss: its largest from {cell(values[0])} to "
            f"{cell(values[-1])}, beside what the steps met."
        }
        names = list(rows[-1]["layers"])
        if names:
            drawn = curves(
                {name: (steps, [row["layers"].get(name) for row in rows]) for name in names},
                folder / "sharpness-layers.png",
                across="training step",
                up="largest curvature of one layer",
            )
            top = max(names, key=lambda name: rows[-1]["layers"][name])
            pictures[drawn] = f"Sharpness layer by layer; at the end {top} is the sharpest."
        return pictures

    def _report(self, step: int, rate: float | None) -> SharpnessReport | None:
        params, batches = trained(self.probe), chunks(self.probe, self.batch_size)
        loss = mean_loss(self.probe, batches)
        looked: dict[str, Any] = {
            "module": self.probe.model,
            "batch_statistics": self.batch_statistics,
        }
        hessian = Hessian(loss, params, batches, **looked)
        slope = hessian.gradient()
        if not bool(slope.isfinite().all()):
            return None
        generator = torch.Generator(hessian.device).manual_seed(self.seed)
        search: dict[str, Any] = {"steps": 20, "tolerance": 1e-2, "generator": generator}
        top = top_eigenpair(hessian, start=self._direction, **search)
        self._direction = top.vector
        blocks = layers_of(self.probe.model) if self.layers else {}
        found = None
        if self._before is not None and self._before[0] == step - 1:
            moved = [was - p.detach() for was, p in zip(self._before[1], params)]
            if any(bool(part.any()) for part in moved):
                found = directional_sharpness(loss, params, moved, batches, **looked)
        return SharpnessReport(
            step=step,
            loss=hessian.value(),
            gradient_norm=float(slope.norm()),
            sharpness=top.value,
            eta_lambda=None if rate is None else rate * top.value,
            layers=block_sharpness(loss, blocks, batches, **looked, **search),
            along_step=None if found is None else found.sharpness,
            cosine=None if found is None else found.cosine,
        )


def layers_of(module: nn.Module) -> dict[str, list[Tensor]]:
    """The trained weights by the layer that holds them, in order; shared ones only once.

    Example:
        >>> {name: len(held) for name, held in layers_of(nn.Sequential(nn.Linear(2, 3))).items()}
        {'0': 2}
    """
    found: dict[str, list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            found.setdefault(name.rpartition(".")[0] or name, []).append(p)
    return found


def block_sharpness(
    loss: Callable[[Any], Tensor],
    blocks: Mapping[str, Sequence[Any]],
    batches: Sequence[Any],
    *,
    module: nn.Module | None = None,
    batch_statistics: bool = False,
    steps: int = 20,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """How sharply the loss is curved when one layer moves and the others stay.

    None of these exceeds the sharpness of all weights together. Early layers, which meet the
    largest features of the data, are usually the sharpest.

    Args:
        loss: from a batch to the mean loss over it.
        blocks: name to weights, such as `layers_of(model)`.
        batches: what the loss is averaged over.
        module: the model, which is looked at in evaluation mode.
        batch_statistics: see `Hessian`.
        steps: most Hessian-vector products a block.
        tolerance: largest residual, as a part of the eigenvalue.
        generator: the source of randomness, on the weights' device.

    Example:
        >>> a, b = (torch.tensor(w, requires_grad=True) for w in (1.0, 2.0))
        >>> found = block_sharpness(lambda _: a**2 + 3 * b**2, {"a": [a], "b": [b]}, [None])
        >>> {name: round(value, 4) for name, value in found.items()}
        {'a': 2.0, 'b': 6.0}

    Source: arXiv 2311.04163, section 3.
    """
    found = {}
    for name, params in blocks.items():
        hessian = Hessian(loss, params, batches, module=module, batch_statistics=batch_statistics)
        pair = top_eigenpair(hessian, steps=steps, tolerance=tolerance, generator=generator)
        found[name] = pair.value
    return found
