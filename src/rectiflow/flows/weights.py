"""Weights of the loss over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rectiflow.errors import positive, unknown
from rectiflow.flows.paths import TINY, Path

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.premetrics import Premetric, Regression

Weight = Callable[[Tensor, Path], Tensor]


def signal_to_noise(t: Float[Tensor, "*b"], path: Path) -> Float[Tensor, "*b"]:
    """The squared ratio of target to source in the state: `(t / (1 - t))²` on straight lines.

    Example:
        >>> import torch
        >>> from rectiflow.flows.paths import RectifiedPath
        >>> signal_to_noise(torch.tensor([0.0, 0.5, 0.75]), RectifiedPath())
        tensor([0., 1., 9.])
    """
    return (path.alpha(t) / path.sigma(t).clamp(min=TINY)).square()


# The weights of the official code by their names there, for any path; "clipped" is min-SNR-5.
WEIGHTS: dict[str, Weight] = {
    "snr": signal_to_noise,
    "inverse-snr": lambda t, path: 1 / signal_to_noise(t, path).clamp(min=TINY**2),
    "snr+1": lambda t, path: signal_to_noise(t, path) + 1,
    "karras": lambda t, path: signal_to_noise(t, path) + 1 / 0.25,
    "truncated": lambda t, path: signal_to_noise(t, path).clamp(min=1),
    "clipped": lambda t, path: signal_to_noise(t, path).clamp(max=5),
    "squared-noise": lambda t, path: path.sigma(t).square(),
}


@dataclass(frozen=True)
class Weighted:
    """A premetric times a weight that depends on the time.

    Uniform weights are the right start; the others trade one part of the path for another. With s
    the signal-to-noise ratio `(alpha / sigma)²`: `snr` s, `inverse-snr` 1/s, `snr+1` s + 1,
    `karras` s + 4 (data of deviation 0.5), `truncated` max(s, 1), `clipped` min(s, 5) and
    `squared-noise` `sigma²`, which on straight lines is `(1 - t)²`. Several grow without bound at
    an end of the path, where a single sample would outweigh the batch: hence the limit.

    Args:
        premetric: the loss of a sample.
        weight: a name of `WEIGHTS`, or a function of times `(b,)` and path.
        limit: the largest weight.

    Raises:
        ValueError: an unknown name or a limit that is not positive.

    Example:
        >>> from rectiflow.flows.premetrics import L2
        >>> Weighted(L2(), "snr").limit
        10000.0

    Source: arXiv 2407.12718, the official code, which lets snr reach 1e6 near t = 1; the clipped
        weight is arXiv 2303.09556, section 3.4.
    """

    premetric: Premetric
    weight: str | Weight
    limit: float = 1e4

    def __post_init__(self) -> None:
        positive("limit", self.limit)
        if isinstance(self.weight, str) and self.weight not in WEIGHTS:
            raise unknown("loss weight", self.weight, WEIGHTS)

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        weight = WEIGHTS[self.weight] if isinstance(self.weight, str) else self.weight
        by_time = weight(regression.t, regression.path).clamp(max=self.limit)
        return by_time * self.premetric(regression)
