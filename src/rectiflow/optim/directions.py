"""Direction rules: what a step makes of a gradient, before anything rectifies it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rectiflow.errors import positive, unknown
from rectiflow.optim.parts import (
    Direction,
    Stretch,
    add_scaled,
    approach,
    approach_square,
    scale_and_shift,
    square_root,
)


def check_betas(betas: Any) -> None:
    """Raise ValueError unless betas are two decays in [0, 1)."""
    try:
        first, second = (float(beta) for beta in betas)
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers, got {betas!r}") from None
    for beta in (first, second):
        if not 0 <= beta < 1:
            raise ValueError(f"betas must be in [0, 1), got {betas!r}")


@dataclass(frozen=True)
class Momentum(Direction):
    """Stochastic gradient descent, with or without a memory.

    `b = momentum b + (1 - dampening) g`, at first `b = g`; the direction is b, with `nesterov`
    `g + momentum b`.

    Args:
        momentum: weight of the memory; 0 keeps none.
        dampening: share of the gradient left out of the memory.
        nesterov: look ahead along the memory.

    Raises:
        ValueError: numbers out of range, or nesterov without momentum or with dampening.

    Source: `torch.optim.SGD`, with which it agrees.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def defaults(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "dampening": self.dampening}

    def check(self, group: Mapping[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if group["momentum"] and not self.momentum:
            raise ValueError(
                "a group asks for momentum, but the optimizer was made without: give it momentum"
            )
        if not 0 <= group["dampening"] <= 1:
            raise ValueError(f"dampening must be in [0, 1], got {group['dampening']}")
        if self.nesterov and (not group["momentum"] or group["dampening"]):
            raise ValueError("nesterov needs momentum > 0 and no dampening")

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        kept, first = float(group["momentum"]), step == 1
        return {
            "kept": 0.0 if first else kept,
            "taken": 1.0 if first else 1.0 - group["dampening"],
            "ahead": kept,
        }

    def apply(self, stretch: Stretch) -> None:
        if not self.momentum:
            stretch.direction = stretch.momentum_gradient
            return
        number, memory = stretch.numbers, stretch.state["momentum_buffer"]
        add_scaled(memory.mul_(number["kept"]), stretch.momentum_gradient, number["taken"])
        stretch.direction = memory
        if self.nesterov:
            stretch.direction = stretch.momentum_gradient + memory * number["ahead"]


@dataclass(frozen=True)
class Adam(Direction):
    """Adam's direction: a mean of gradients over the root of a mean of their squares.

    Args:
        betas: decays of both means.
        eps: added to the root.
        amsgrad: divide by the largest mean of squares so far.
        nesterov: `b1 m + (1 - b1) g` in place of m.
        eps_mode: "corrected" adds eps to the root of the corrected mean, as the paper and torch
            do; "uncorrected" to that of the plain mean, as torch did before 2018, so that eps
            counts for `eps / sqrt(1 - b2^t)`.
        rectify: the variance rectification of RAdam in front of the step.

    Raises:
        ValueError: betas outside [0, 1), a negative eps, an unknown mode.

    Source: arXiv 1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018; RAdam: arXiv 1908.03265.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    nesterov: bool = False
    eps_mode: str = "corrected"
    rectify: bool = False

    def __post_init__(self) -> None:
        if self.eps_mode not in ("corrected", "uncorrected"):
            raise unknown("eps mode", self.eps_mode, ("corrected", "uncorrected"))

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    @property
    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps}

    def check(self, group: Mapping[str, Any]) -> None:
        check_betas(group["betas"])
        positive("eps", group["eps"], zero=True)

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        first, second = (float(beta) for beta in group["betas"])
        correction, root = 1 - first**step, math.sqrt(1 - second**step)
        eps = float(group["eps"])
        found = {
            "first": 1 - first,
            "second": 1 - second,
            # Both corrections and eps in the one line that the denominator is of the root.
            "root_scale": correction / root,
            "root_offset": eps * correction / (1.0 if self.eps_mode == "corrected" else root),
            "eps": eps,
        }
        if self.rectify:
            found |= _rectification(second, step, correction)
        return found

    def apply(self, stretch: Stretch) -> None:
        number, state = stretch.numbers, stretch.state
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        approach(mean, stretch.momentum_gradient, number["first"])
        approach_square(square, stretch.gradient, number["second"])
        if self.amsgrad:
            square = torch.maximum(state["max_exp_avg_sq"], square, out=state["max_exp_avg_sq"])
        travel = mean
        if self.nesterov:
            travel = mean + (stretch.momentum_gradient - mean) * number["first"]
        scale = scale_and_shift(square_root(square), number["root_scale"], number["root_offset"])
        if self.rectify:
            stretch.direction = travel * (number["plain"] + number["adaptive"] / scale)
        else:
            stretch.direction = torch.div(travel, scale, out=scale)


def _rectification(decay: float, step: int, correction: float) -> dict[str, float]:
    """Weights of the plain and of the adaptive step while the mean of squares is young.

    The plain one divides by the mean's correction itself, the adaptive one in its denominator.
    """
    longest = 2 / (1 - decay) - 1
    power = decay**step
    length = longest - 2 * step * power / (1 - power)
    if length < 5:
        return {"plain": 1 / correction, "adaptive": 0.0}
    grown = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return {"plain": 0.0, "adaptive": math.sqrt(grown)}


@dataclass(frozen=True)
class Adagrad(Direction):
    """The gradient over the root of the sum of all squares so far.

    Args:
        eps: added to the root.
        initial: what the sums begin with.

    Raises:
        ValueError: a negative number.

    Source: Duchi et al. 2011, diagonal form; `torch.optim.Adagrad`, with which it agrees.
    """

    eps: float = 1e-10
    initial: float = 0.0
    slots = ("sum",)

    def __post_init__(self) -> None:
        positive("initial", self.initial, zero=True)

    @property
    def defaults(self) -> dict[str, Any]:
        return {"eps": self.eps}

    def check(self, group: Mapping[str, Any]) -> None:
        positive("eps", group["eps"], zero=True)

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        return {"eps": float(group["eps"]), "begin": self.initial if step == 1 else 0.0}

    def apply(self, stretch: Stretch) -> None:
        total = stretch.state["sum"]
        total.add_(stretch.gradient.square() + stretch.numbers["begin"])
        stretch.direction = stretch.momentum_gradient / square_root(total).add_(
            stretch.numbers["eps"]
        )


@dataclass(frozen=True)
class Lion(Direction):
    """The sign of a mixture of memory and gradient.

    Args:
        betas: weight of the memory in the mixture, and its own decay.

    Raises:
        ValueError: betas outside [0, 1).

    Source: arXiv 2302.06675, algorithm 2.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    slots = ("exp_avg",)

    @property
    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas}

    def check(self, group: Mapping[str, Any]) -> None:
        check_betas(group["betas"])

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        first, second = group["betas"]
        return {"first": 1 - first, "second": 1 - second}

    def apply(self, stretch: Stretch) -> None:
        memory, new = stretch.state["exp_avg"], stretch.momentum_gradient
        mixed = memory + (new - memory) * stretch.numbers["first"]
        approach(memory, new, stretch.numbers["second"])
        stretch.direction = mixed.sign_()
