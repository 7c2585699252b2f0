"""The exact rectified diffusion of a normal distribution: curved states, first-order flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rectiflow.flows.paths import Path, expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairedGaussian:
    """The field of the deterministic pairs `(z, m + s z)`, on any path.

    Exactly one pair passes through a state: `z = (x - alpha m) / (alpha s + sigma)`. So the noise
    estimate is constant along trajectories, first-order steps of any number agree, and yet the
    states move on curves where the path does. It is what rectified diffusion of a normal
    distribution would converge to, and the ruler of its tests; `GaussianField` is the field before.

    Args:
        mean: m, of one sample's shape or broadcasting to it.
        std: s > 0, alike.
        path: the path.

    Raises:
        ValueError: a standard deviation that is not positive.

    Example:
        >>> import torch
        >>> from rectiflow.flows.diffusion_paths import CosinePath
        >>> field = PairedGaussian(torch.tensor([2.0]), torch.tensor([0.5]), CosinePath())
        >>> field.denoise(torch.tensor([[1.0]]), torch.zeros(1))
        tensor([[2.5000]])

    Source: arXiv 2410.07303, theorem 1, with a linear map for the pairs.
    """

    mean: Tensor
    std: Tensor
    path: Path

    def __post_init__(self) -> None:
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be > 0 everywhere, got {self.std.min().item()}")

    def noise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The source of the one pair that passes through the state."""
        if condition:
            raise ValueError(f"an analytic field takes no condition, got {', '.join(condition)}")
        alpha, sigma = self.path.alpha(expand(t, x)), self.path.sigma(expand(t, x))
        return (x - alpha * self.mean.to(x)) / (alpha * self.std.to(x) + sigma)

    def denoise(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The target of that pair."""
        return self.mean.to(x) + self.std.to(x) * self.noise(x, t, **condition)

    def velocity(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The direction in which the pair's path moves."""
        noise = self.noise(x, t, **condition)
        data = self.mean.to(x) + self.std.to(x) * noise
        return self.path.velocity(noise, data, t)
