"""Weights of a divergence from density ratios, normalised twice so that their mean is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rectiflow.distill.divergences import Divergence
from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float

TINY = 1e-6
"""Means are held above this when they divide."""


class RatioWeights(nn.Module):
    """Turns density ratios at times into weights of mean one, over all processes.

    First each ratio is divided by the mean ratio of its time bin, since how far apart data and
    generator look depends on the noise. Then `h` of the result is divided by its mean over the
    batch, so that the learning rate means the same under every divergence. The bins' means are an
    exponential average over steps; they are buffers, so that checkpoints keep them.

    Both stages see one micro-batch at a time: with gradients accumulated over k of them the bins
    move k times a step and each part has mean one by itself, so k parts are close to the whole
    batch, not equal to it.

    Args:
        bins: number of equal time bins; 0 leaves the first stage out.
        ema: decay of the bins' means. With 0 they are those of the batch, and bins that hold one
            sample each give ratios of one, which is no information: keep it at 0.9 or more unless
            the batch is much larger than 8 samples a bin.
        low: start of the first bin.
        high: end of the last bin.

    Raises:
        ValueError: negative bins, a decay outside [0, 1), or an empty range.

    Example:
        >>> from rectiflow.distill.divergences import DIVERGENCES
        >>> weights = RatioWeights(bins=2, ema=0.0)
        >>> weights(torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.3]), DIVERGENCES["kl"])
        tensor([0.5000, 1.5000])

    Source: arXiv 2502.15681, official code (two-stage normalisation; there the decay is 0).
    """

    means: Tensor

    def __init__(
        self, *, bins: int = 10, ema: float = 0.9, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__()
        positive("bins", bins, zero=True)
        if not 0 <= ema < 1:
            raise ValueError(f"ratio ema must be in [0, 1), got {ema}")
        positive("high - low", high - low)
        self.bins, self.ema, self.low, self.high = bins, ema, low, high
        self.register_buffer("means", torch.ones(bins))

    def forward(
        self, ratio: Float[Tensor, " b"], t: Float[Tensor, " b"], divergence: Divergence
    ) -> Float[Tensor, " b"]:
        """The weights; moves the means of the bins that hold samples."""
        if self.bins:
            ratio = self._levelled(ratio, t)
        weights = divergence.weight(ratio)
        total = _everywhere(torch.stack([weights.sum(), weights.new_tensor(weights.numel())]))
        # Clamped rather than shifted: equal weights become exactly one.
        return weights / (total[0] / total[1]).clamp(min=TINY)

    @torch.no_grad()
    def _levelled(self, ratio: Tensor, t: Tensor) -> Tensor:
        share = (t - self.low) / (self.high - self.low)
        where = (share * self.bins).long().clamp(0, self.bins - 1)
        sums = ratio.new_zeros(2, self.bins)
        sums[0].index_add_(0, where, ratio)
        sums[1].index_add_(0, where, torch.ones_like(ratio))
        sums = _everywhere(sums)
        hit = sums[1] > 0
        found = sums[0] / sums[1].clamp(min=1)
        self.means.copy_(torch.where(hit, found.lerp(self.means, self.ema), self.means))
        return ratio / self.means[where].clamp(min=TINY)


def _everywhere(values: Tensor) -> Tensor:
    """Values summed over all processes."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values
