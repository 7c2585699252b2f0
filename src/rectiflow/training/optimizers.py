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
    clipped-sgd, diffgrad, sgdp, sophiag, sophiah or splitsgd."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] | None = None
    """Decay of the first and second moment; the first is SGD's momentum. By default 0.9 and 0.999,
    for Sophia 0.96 and 0.99."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    weight_decay: float = 0.0
    """Weight decay (decoupled for adamw, adamp, sgdp, Sophia and the clipped ones)."""
    gamma: float | None = None
    """Sophia's weight of curvature; by default the paper's, 0.05 for sophiag, 0.01 for sophiah."""
    curvature_every: int = 10
    """Steps between Sophia's looks at the curvature."""
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
        positive("curvature_every", self.curvature_every)
        if not 0 <= self.clip_coordinates < 1:
            raise ValueError(f"clip_coordinates must be in [0, 1), got {self.clip_coordinates}")
        for name in ("warmup", "clip_norm", "weight_decay"):
            positive(name, getattr(self, name), zero=True)


# Fused kernels are three times faster than the loop, on the CPU too.
Build = Callable[
    [Iterable[nn.Parameter], OptimizerSettings, tuple[float, float]], torch.optim.Optimizer
]
_BUILDERS: dict[str, Build] = {
    "adam": lambda p, s, betas: torch.optim.Adam(
        p, s.learning_rate, betas=betas, eps=s.eps, weight_decay=s.weight_decay, fused=True
    ),
    "adamw": lambda p, s, betas: torch.optim.AdamW(
        p, s.learning_rate, betas=betas, eps=s.eps, weight_decay=s.weight_decay, fused=True
    ),
    "sgd": lambda p, s, betas: torch.optim.SGD(
        p, s.learning_rate, momentum=betas[0], weight_decay=s.weight_decay, fused=True
    ),
    "adadagrad": lambda p, s, betas: optim.AdAdaGrad(
        p, s.learning_rate, weight_decay=s.weight_decay
    ),
    "adadagradnorm": lambda p, s, betas: optim.AdAdaGradNorm(
        p, s.learning_rate, weight_decay=s.weight_decay
    ),
    "adamp": lambda p, s, betas: optim.AdamP(
        p, s.learning_rate, betas=betas, eps=s.eps, weight_decay=s.weight_decay
    ),
    "clipped-adam": lambda p, s, betas: optim.CoordinateClipped(
        p, optim.Adam(betas, s.eps), s.learning_rate, fraction=0.5, weight_decay=s.weight_decay
    ),
    "clipped-sgd": lambda p, s, betas: optim.CoordinateClipped(
        p, optim.Momentum(betas[0]), s.learning_rate, weight_decay=s.weight_decay
    ),
    "diffgrad": lambda p, s, betas: optim.DiffGrad(
        p, s.learning_rate, betas=betas, eps=s.eps, weight_decay=s.weight_decay
    ),
    "sgdp": lambda p, s, betas: optim.SGDP(
        p, s.learning_rate, momentum=betas[0], weight_decay=s.weight_decay
    ),
    "sophiag": lambda p, s, betas: optim.SophiaG(
        p,
        s.learning_rate,
        betas=betas,
        gamma=0.05 if s.gamma is None else s.gamma,
        weight_decay=s.weight_decay,
        interval=s.curvature_every,
    ),
    "sophiah": lambda p, s, betas: optim.SophiaH(
        p,
        s.learning_rate,
        betas=betas,
        gamma=0.01 if s.gamma is None else s.gamma,
        weight_decay=s.weight_decay,
        interval=s.curvature_every,
    ),
    "splitsgd": lambda p, s, betas: optim.SplitSGD(
        p, s.learning_rate, momentum=betas[0], weight_decay=s.weight_decay
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
    usual = (0.96, 0.99) if settings.name.startswith("sophia") else (0.9, 0.999)
    return _BUILDERS[settings.name](trained, settings, settings.betas or usual)


def rate(settings: OptimizerSettings, step: float, steps: int) -> float:
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
