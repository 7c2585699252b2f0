"""The exact field to a mixture of normal distributions, on any path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import TYPE_CHECKING, Any

from rectiflow.flows.paths import TINY, Path, RectifiedPath, expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class MixtureField:
    """The field from standard normal noise to a mixture of equally wide normal distributions.

    A teacher without a network: the estimate of the data, the flow and the density at every time
    are known. Given the state, mode k has weight `w_k N(x; alpha m_k, alpha² s² + sigma²)`, and
    within it the data are `m_k + alpha s² (x - alpha m_k) / (alpha² s² + sigma²)`.

    Args:
        means: centres m, `(modes, d)`.
        shares: weights w of the modes, positive; divided by their sum.
        std: standard deviation s of every mode.
        path: the path; rectified by default.

    Raises:
        ValueError: shares that are not one positive number a mode, or s not positive.

    Example:
        >>> import torch
        >>> field = MixtureField(torch.tensor([[-1.0], [3.0]]), torch.ones(2), 0.1)
        >>> field.denoise(torch.zeros(1, 1), torch.zeros(1))
        tensor([[1.]])

    Source: arXiv 2209.03003, equation 1, with a mixture at the data's end.
    """

    means: Tensor
    shares: Tensor
    std: float
    path: Path = attribute(default_factory=RectifiedPath)

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.shares.shape != self.means.shape[:1]:
            raise ValueError(
                "a mixture needs means (modes, d) with one share each, got "
                f"{tuple(self.means.shape)} and {tuple(self.shares.shape)}"
            )
        if not bool((self.shares > 0).all()) or not self.std > 0:
            raise ValueError("shares and std of a mixture must be > 0")

    def denoise(
        self, x: Float[Tensor, "b d"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b d"]:
        """The mean of the data given the state."""
        logits, offsets, gain = self._at(x, t)
        modes = self.means.to(x) + gain * offsets
        return (logits.softmax(1).unsqueeze(2) * modes).sum(1)

    def noise(
        self, x: Float[Tensor, "b d"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b d"]:
        """The mean of the source given the state."""
        alpha, sigma = self.path.alpha(expand(t, x)), self.path.sigma(expand(t, x))
        return (x - alpha * self.denoise(x, t)) / sigma.clamp(min=TINY)

    def velocity(
        self, x: Float[Tensor, "b d"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b d"]:
        """The mean of the path's derivative given the state."""
        return self.path.velocity(self.noise(x, t), self.denoise(x, t), t)

    def log_density(self, x: Float[Tensor, "b d"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The log-density (nats) of states at their times."""
        return self._at(x, t)[0].logsumexp(1)

    def _at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights of the modes, offsets from their centres, and the data's share of these."""
        alpha, sigma = (
            part(expand(t, x)).unsqueeze(2) for part in (self.path.alpha, self.path.sigma)
        )
        offsets = x.unsqueeze(1) - alpha * self.means.to(x)
        variance = (alpha * self.std).square() + sigma.square()
        shares = (self.shares / self.shares.sum()).to(x).log()
        square = offsets.square().sum(2) / variance.squeeze(2)
        size = 0.5 * x.shape[1] * (2 * math.pi * variance.squeeze(2)).log()
        return shares - 0.5 * square - size, offsets, alpha * self.std**2 / variance
