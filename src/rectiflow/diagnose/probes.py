"""Fixed sets of samples whose losses are looked at during training.

Losses of training batches are biased (their samples have just been stepped on) and noisy; a probe
is the same set at every look. For flow matching it holds times and noises too, since otherwise
their randomness would drown what the weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.diagnose.looking import untouched
from rectiflow.errors import positive
from rectiflow.flows.couplings import Draw, Pairs
from rectiflow.flows.fields import device_of
from rectiflow.training.flow_matching import FlowMatching

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Probe(Protocol):
    """A model with samples, and the loss of each."""

    @property
    def model(self) -> nn.Module:
        """The model whose training is watched."""

    @property
    def labels(self) -> Tensor | None:
        """The label of each sample, if there are labels."""

    def __len__(self) -> int:
        """Number of samples."""

    def losses(self, indices: Tensor) -> Tensor:
        """The losses of some samples, one each, with their graph."""

    def pictures(self, indices: Tensor) -> Tensor | None:
        """Some samples as images in [-1, 1], if they are images."""


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


@dataclass(frozen=True, eq=False)
class SampleProbe:
    """Inputs with targets, for any model `model(input)` with a loss a sample.

    Args:
        model: the model.
        inputs: one row a sample.
        targets: one row a sample.
        loss: from outputs and targets to one loss a sample; cross-entropy by default.
        labels: labels of the samples; the targets themselves by default if they are integers.
        images: the samples as images in [-1, 1], to be shown; the inputs by default if they have
            the form of images.

    Raises:
        ValueError: rows that do not match.

    Example:
        >>> probe = SampleProbe(nn.Linear(2, 3), torch.randn(5, 2), torch.tensor([0, 2, 1, 0, 1]))
        >>> len(probe), probe.losses(torch.tensor([4, 0])).shape
        (5, torch.Size([2]))
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy
    labels: Tensor | None = None
    images: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "labels", "images"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.inputs):
                raise ValueError(
                    f"a probe has one row a sample: {len(self.inputs)} inputs, {len(rows)} {name}"
                )
        targets = self.targets
        if self.labels is None and targets.ndim == 1 and not targets.is_floating_point():
            object.__setattr__(self, "labels", targets)
        if self.images is None and self.inputs.ndim == 4:
            object.__setattr__(self, "images", self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def losses(self, indices: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self.loss(self.model(self.inputs[indices]), self.targets[indices])

    def pictures(self, indices: Int[Tensor, " b"]) -> Tensor | None:
        return None if self.images is None else self.images[indices]


@dataclass(frozen=True, eq=False)
class FlowProbe:
    """Pairs with times for a flow: what flow matching regresses on, drawn once, at the first look.

    Args:
        method: what is trained: flow matching, or a method that only changes its pairs, times and
            single losses, as reflow and one-step distillation do.
        count: number of samples.
        seed: which samples, noises and times.

    Raises:
        ValueError: a method whose loss is another one.
    """

    method: FlowMatching
    count: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        positive("count", self.count)
        kind = type(self.method)
        if getattr(kind, "loss", None) is not FlowMatching.loss:
            raise ValueError(
                f"{kind.__name__} has no loss of single pairs at single times, which sharpness, "
                "opposing signals and scale invariance are found by: leave those out here"
            )

    @cached_property
    def drawn(self) -> tuple[Pairs, Tensor]:
        """The pairs and their times, on the model's device."""
        # A seed far from those of trainings, whose first batch this must not be.
        generator = torch.Generator(device_of(self.method.model))
        draw = Draw.of(self.count, seed=self.seed + 7_654_321, generator=generator)
        pairs = self.method.coupling.draw(draw)
        t = self.method.times.sample(self.count, generator=draw.generator)
        return pairs, t.to(pairs.target.dtype)

    @property
    def model(self) -> nn.Module:
        return self.method.model

    @property
    def labels(self) -> Tensor | None:
        return self.drawn[0].condition.get("label")

    def __len__(self) -> int:
        return self.count

    def losses(self, indices: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        pairs, t = self.drawn
        chosen = indices.to(t.device)
        part = replace(pairs, **_rows(vars(pairs), chosen))
        return self.method.losses(part, t[chosen], part.condition)

    def pictures(self, indices: Int[Tensor, " b"]) -> Tensor | None:
        pairs, t = self.drawn
        return pairs.target[indices.to(t.device)] if pairs.target.ndim == 4 else None


def _rows(table: Mapping[str, Any], indices: Tensor) -> dict[str, Any]:
    """Some rows of every tensor in a table and in tables inside it."""
    return {
        name: value[indices]
        if isinstance(value, Tensor)
        else _rows(value, indices)
        if isinstance(value, Mapping)
        else value
        for name, value in table.items()
    }


def trained(probe: Probe) -> list[Tensor]:
    """The weights of a probe's model that are trained."""
    return [p for p in probe.model.parameters() if p.requires_grad]


def rate_of(optimizer: Any) -> float | None:
    """The learning rate of the step that an optimizer has just taken; None without an optimizer."""
    return None if optimizer is None else float(optimizer.param_groups[0]["lr"])


def chunks(probe: Probe, batch_size: int | None) -> list[Tensor]:
    """All sample numbers of a probe, in batches; without a size in one."""
    return list(torch.arange(len(probe)).split(batch_size or len(probe)))


def mean_loss(probe: Probe, batches: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A loss of batches whose average over them is the mean over samples, however they are cut."""
    share = len(batches) / sum(len(batch) for batch in batches)
    return lambda batch: probe.losses(batch).sum() * share


def sample_losses(
    probe: Probe, *, batch_size: int | None = None, batch_statistics: bool = False
) -> Float[Tensor, " n"]:
    """The loss of every sample of a probe, as it is now; the model is left as it was.

    Args:
        probe: the probe.
        batch_size: samples at once; all by default.
        batch_statistics: see `untouched`; then all samples go at once.

    Example:
        >>> probe = SampleProbe(nn.Linear(2, 3), torch.randn(5, 2), torch.tensor([0, 2, 1, 0, 1]))
        >>> sample_losses(probe, batch_size=2).shape
        torch.Size([5])
    """
    size = None if batch_statistics else batch_size
    with untouched(probe.model, batch_statistics=batch_statistics), torch.no_grad():
        return torch.cat([probe.losses(batch) for batch in chunks(probe, size)]).detach()
