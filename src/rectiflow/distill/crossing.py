"""Do the lines between pairs cross? A look at the noises that a crossing would need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rectiflow.flows.couplings import Pairs
from rectiflow.flows.pair_store import PairStore

if TYPE_CHECKING:
    from jaxtyping import Float

# A source within this many standard deviations of a normal draw's may be one.
TYPICAL = 4.0


@dataclass(frozen=True)
class CrossingRisk:
    """What noises would have to look like for lines of pairs to cross.

    Attributes:
        time: the time of the crossings looked at.
        norm: root mean square size of the pairs' own noises; 1 for standard normal ones.
        crossing_norm: the same of the noises that a crossing needs.
        correlation: correlation of neighbouring values in the pairs' own noises; 0 if normal.
        crossing_correlation: the same of the noises that a crossing needs.
        risk: share of the crossings whose noise could be a standard normal draw, by both measures.
        count: pairs of pairs looked at.
    """

    time: float
    norm: float
    crossing_norm: float
    correlation: float
    crossing_correlation: float
    risk: float
    count: int

    @property
    def sentence(self) -> str:
        """The finding in words."""
        found = (
            f"Lines would cross at t = {self.time:g} only if noises had {self.crossing_norm:.2f} "
            f"times the usual size and neighbours correlated by {self.crossing_correlation:.2f}: "
            f"{self.risk:.1%} of them could be drawn"
        )
        if self.risk < 0.01:
            return f"{found}, so one round of reflow should leave nearly straight paths."
        return f"{found}, so lines do cross and one round of reflow may not be enough."


@torch.no_grad()
def crossing_risk(
    pairs: PairStore | Pairs,
    *,
    time: float = 0.5,
    count: int = 4096,
    generator: torch.Generator | None = None,
) -> CrossingRisk:
    """How unlikely it is that the lines of two pairs meet, judged by the noise it would take.

    The lines from (z', x') and (z'', x'') meet at time t only if `z'' = z' + t/(1-t) (x' - x'')`.
    Differences of images are large and smooth, so such a z'' is no typical noise and its flow does
    not end at x''; then pairs made by a flow hardly cross, and one reflow is nearly straight. In
    few dimensions, where noises have no typical size, the risk is high.

    Args:
        pairs: a store, of which evenly spaced pairs are taken, or pairs at hand.
        time: t in (0, 1).
        count: pairs taken; each meets one other.
        generator: decides which.

    Raises:
        ValueError: a time outside (0, 1), or fewer than two pairs.

    Example:
        >>> noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> images = torch.linspace(-1, 1, 100).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        >>> crossing_risk(Pairs(noise, images)).crossing_correlation > 0.1
        True

    Source: arXiv 2405.20320, section 3.
    """
    if not 0 < time < 1:
        raise ValueError(f"time must be between 0 and 1, got {time}")
    if isinstance(pairs, PairStore):
        rows = torch.linspace(0, len(pairs) - 1, min(count, len(pairs))).long()
        pairs = Pairs(*pairs.rows(rows))
    source, target = pairs.source[:count].cpu().double(), pairs.target[:count].cpu().double()
    if len(source) < 2:
        raise ValueError(f"two pairs or more can cross, got {len(source)}")
    # A random cycle: no pair meets itself.
    order = torch.randperm(len(source), generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    needed = source + time / (1 - time) * (target - target[other])
    size = source[0].numel()
    squares = needed.square().flatten(1).mean(1)
    correlations, neighbours = _correlations(needed)
    # The mean of d squares of normal numbers has variance 2 / d, their correlation 1 / neighbours.
    typical = (squares - 1).abs() <= TYPICAL * math.sqrt(2 / size)
    if neighbours:
        typical &= correlations.abs() <= TYPICAL / math.sqrt(neighbours)
    return CrossingRisk(
        time=time,
        norm=float(source.square().mean().sqrt()),
        crossing_norm=float(squares.mean().sqrt()),
        correlation=float(_correlations(source)[0].mean()),
        crossing_correlation=float(correlations.mean()),
        risk=float(typical.double().mean()),
        count=len(source),
    )


def _correlations(x: Float[Tensor, "b *dims"]) -> tuple[Float[Tensor, " b"], int]:
    """The lag-1 correlation of each sample, over the last two axes of images; and its terms."""
    total, terms = torch.zeros(len(x), dtype=x.dtype), 0
    for axis in range(max(1, x.ndim - 2), x.ndim):
        if x.shape[axis] < 2:
            continue
        ahead, behind = x.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, 0, x.shape[axis] - 1)
        product = (ahead * behind).flatten(1)
        total = total + product.sum(1)
        terms += product.shape[1]
    power = x.square().flatten(1).mean(1)
    return total / (max(terms, 1) * power), terms
