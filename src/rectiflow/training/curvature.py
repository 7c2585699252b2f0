"""Curvature for Sophia inside a training: refreshed on a step's own draws when it is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rectiflow.flows.couplings import Draw
from rectiflow.optim.curvature import statistics_kept
from rectiflow.optim.sophia import SophiaG, SophiaH
from rectiflow.training.method import Phase


def check(optimizer: torch.optim.Optimizer, phase: Phase, *, compiled: bool) -> None:
    """Refuse an optimizer that this phase cannot tell its curvature.

    Raises:
        ValueError: SophiaG for a loss without a likelihood; SophiaH for a compiled network, which
            has no second derivative.
    """
    if isinstance(optimizer, SophiaG) and phase.sampled is None:
        raise ValueError(
            f"sophiag draws targets from the model, and the {phase.name} loss is not the squared "
            "error of a flow: take sophiah, which works for any loss"
        )
    if isinstance(optimizer, SophiaH) and compiled:
        raise ValueError(
            "sophiah needs second derivatives, which a compiled network does not have: "
            "leave --compile out or take sophiag"
        )


def refresh_if_due(
    optimizer: torch.optim.Optimizer, phase: Phase, draws: Sequence[Callable[[], Draw]]
) -> None:
    """Tell Sophia the curvature of the step's micro-batches, every so many steps.

    In full precision, with the module's running statistics kept. Micro-batches and processes share
    the drawn targets or probes of the whole step, so their number does not matter.

    Args:
        optimizer: any optimizer; others than Sophia are left alone.
        phase: whose loss it is.
        draws: makes the draw of each micro-batch of this process.
    """
    if not isinstance(optimizer, SophiaG | SophiaH) or not optimizer.due:
        return
    with statistics_kept(phase.module):
        if isinstance(optimizer, SophiaG):
            sampled = phase.sampled
            assert sampled is not None
            optimizer.refresh(*(lambda make=make: sampled(make()) for make in draws))
        else:
            # Reseeded by every draw, and so at the same place after each micro-batch's loss.
            generator = draws[0]().generator
            # Fused attention cannot be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH):
                optimizer.refresh(
                    *(lambda make=make: phase.loss(make()) for make in draws), generator=generator
                )


def win_rates(phases: Sequence[Phase], wrapped: Sequence[Any]) -> dict[str, float]:
    """The share of weights whose next Sophia step is not clipped, by phase."""
    found = {}
    for phase, optimizer in zip(phases, wrapped):
        own = optimizer.optimizer
        if isinstance(own, SophiaG | SophiaH):
            name = "win_rate" if len(phases) == 1 else f"win_rate/{phase.name}"
            found[name] = own.win_rate()
    return found
