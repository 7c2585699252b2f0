"""How hard denoising is at several resolutions: curves that the time shift makes one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.flows.couplings import Independent
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.time_shift import TimeShift, shift_times
from rectiflow.recipes.tools import new_model, stage, train
from rectiflow.training.data import ImageData
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class CurveSettings:
    """The same images in several sizes, one flow for each."""

    factors: tuple[int, ...] = (2, 4)
    """Enlargements beside the original size."""
    net: str = "mlp"
    """Network or size preset."""
    net_options: Mapping[str, Any] = field(default_factory=lambda: {"width": 256, "depth": 1})
    """Its arguments."""
    training: TrainerSettings = field(default_factory=lambda: stage(1500))
    """Every training, on times shifted by the factor."""
    times: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Times at the original size at which the curves are compared."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights and batches."""


@dataclass(frozen=True)
class Curves:
    """Errors of the estimated data, per pixel, at one size.

    Attributes:
        same: at the times of the original size.
        shifted: at those times shifted by the factor.
    """

    same: list[float]
    shifted: list[float]


def enlarge(images: Float[Tensor, "n c h w"], factor: int) -> Float[Tensor, "n c i j"]:
    """Every pixel as a block of factor x factor equal ones.

    Example:
        >>> enlarge(torch.eye(2)[None, None], 2)[0, 0, 0].tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def denoising_errors(
    model: FlowModel, images: Float[Tensor, "n c h w"], times: Sequence[float], seed: int
) -> list[float]:
    """`E|denoise(x_t) - data|²` per pixel at every time, with fresh noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    images, noise = images.to(device_of(model)), noise.to(device_of(model))
    found = []
    with torch.no_grad(), evaluating(model):
        for moment in times:
            t = torch.full((len(images),), moment, device=images.device)
            x = model.path.interpolate(noise, images, t)
            found.append(float((model.denoise(x, t) - images).square().mean()))
    return found


def curves_at_every_size(settings: CurveSettings, data: ImageData, seed: int) -> dict[int, Curves]:
    """Train at the original size and at every enlargement, and measure the errors."""
    images = data.batch(torch.arange(len(data)))
    found = {}
    for factor in (1, *settings.factors):
        large = enlarge(images, factor)
        start = new_model(settings.net, large.shape[1:], seed=seed, **settings.net_options)
        model = train(
            FlowMatching(start, Independent(large), TimeShift(float(factor))),
            replace(settings.training, seed=seed),
            title=f"{large.shape[-1]} pixels, seed {seed}",
        )
        shifted = [shift_times(t, float(factor)) for t in settings.times]
        found[factor] = Curves(
            denoising_errors(model, large, settings.times, seed + 77),
            denoising_errors(model, large, shifted, seed + 77),
        )
    return found


def distance(curve: Sequence[float], other: Sequence[float]) -> float:
    """The mean distance of two curves of errors, on a logarithmic scale.

    Example:
        >>> round(distance([1.0, 2.0], [1.0, 4.0]), 4)
        0.3466
    """
    return sum(abs(math.log(a / b)) for a, b in zip(curve, other)) / len(curve)
