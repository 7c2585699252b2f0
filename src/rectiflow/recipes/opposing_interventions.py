"""Is it the groups? Training goes on from just before a spike, in five ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rectiflow.diagnose import SampleProbe

if TYPE_CHECKING:
    from jaxtyping import Int

UNCHANGED, WITHOUT, RANDOM, CLIPPED, SLOWER = (
    "unchanged",
    "without the groups",
    "without random samples",
    "gradient of the groups clipped",
    "half the learning rate",
)


def descend(net: nn.Module, loss: Callable[[], Tensor], rate: float) -> None:
    """One step of plain gradient descent."""
    slopes = torch.autograd.grad(loss(), list(net.parameters()))
    with torch.no_grad():
        for p, slope in zip(net.parameters(), slopes):
            p.sub_(slope, alpha=rate)


def intervene(
    probe: SampleProbe,
    state: Mapping[str, Tensor],
    groups: Int[Tensor, " m"],
    *,
    rate: float,
    steps: int,
    seed: int = 0,
) -> dict[str, float]:
    """The largest rise of the loss over some steps of full-batch descent, by intervention.

    The loss that is judged is that of samples which are in the training of every arm, so that
    leaving out samples does not count as lowering their loss. The clipped arm scales the groups'
    part of the gradient down to the length that a random group of that size has.

    Args:
        probe: the model with all its samples; the model is left with the last arm's weights.
        state: its weights before the spike.
        groups: the samples of both groups.
        rate: learning rate.
        steps: steps of each arm.
        seed: of the random samples.
    """
    net, count = probe.model, len(probe)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    outside = order[~torch.isin(order, groups)]
    random, rest = outside[: len(groups)], outside[len(groups) :]
    everyone = torch.arange(count)
    others = everyone[~torch.isin(everyone, groups)]

    def over(indices: Tensor) -> Callable[[], Tensor]:
        return lambda: probe.losses(indices).mean()

    net.load_state_dict(state)
    usual = _length(torch.autograd.grad(over(random)(), list(net.parameters())))
    share = len(groups) / count

    def clipped() -> Tensor:
        part = over(groups)()
        slopes = torch.autograd.grad(part, list(net.parameters()), retain_graph=True)
        scale = min(1.0, usual / max(_length(slopes), 1e-12))
        return (1 - share) * over(others)() + share * scale * part

    arms: dict[str, tuple[Callable[[], Tensor], float]] = {
        UNCHANGED: (over(everyone), rate),
        WITHOUT: (over(others), rate),
        RANDOM: (over(everyone[~torch.isin(everyone, random)]), rate),
        CLIPPED: (clipped, rate),
        SLOWER: (over(everyone), rate / 2),
    }
    found = {}
    for arm, (loss, own_rate) in arms.items():
        net.load_state_dict(state)
        losses = []
        for _ in range(steps):
            with torch.no_grad():
                losses.append(float(over(rest)()))
            descend(net, loss, own_rate)
        found[arm] = largest_rise(losses)
    return found


def _length(slopes: Sequence[Tensor]) -> float:
    return float(torch.stack([slope.norm() for slope in slopes]).norm())


def largest_rise(losses: Sequence[float]) -> float:
    """How far losses rise above the lowest one before.

    Example:
        >>> largest_rise([3.0, 1.0, 2.0, 0.5, 1.0])
        1.0
    """
    low, rise = float("inf"), 0.0
    for loss in losses:
        low = min(low, loss)
        rise = max(rise, loss - low)
    return rise
