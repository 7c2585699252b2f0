"""EDM's training: a network learns to remove noise of every strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rectiflow.errors import positive
from rectiflow.flows.couplings import Data, Draw, draw_data
from rectiflow.flows.fields import FlowModel
from rectiflow.nets.diffusion import DiffusionVelocity
from rectiflow.training.method import Phase

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Denoising:
    """Train a diffusion network in EDM's own terms; the model it makes is a flow.

    `min E weight(sigma) |D(data + sigma noise, sigma) - data|²` with `log sigma ~ N(mean, std²)`
    and `weight = (sigma² + sigma_data²) / (sigma sigma_data)²`. The model follows straight lines
    and can be reflowed as it is (`interop.edm.from_edm` makes one of a network).

    Args:
        model: a model whose network is a `DiffusionVelocity` of the edm family.
        data: what to denoise; conditions go to the network.
        mean: mean of log sigma.
        std: its standard deviation.

    Raises:
        ValueError: a model of another kind.

    Source: arXiv 2206.00364, equation 8 and table 1.
    """

    model: FlowModel
    data: Data | Tensor
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        positive("std", self.std)
        net = self.model.net
        if not isinstance(net, DiffusionVelocity) or net.family != "edm":
            raise ValueError(
                f"EDM's training needs a model made by interop.edm.from_edm, got a "
                f"{type(net).__name__}"
            )

    def phases(self) -> list[Phase]:
        """The one phase."""
        return [Phase("denoising", self.model, self.loss)]

    def loss(self, draw: Draw) -> Tensor:
        """The mean loss of the draw's rows."""
        target, condition = draw_data(self.data, draw)
        net = self.model.net
        assert isinstance(net, DiffusionVelocity)
        sigma = (self.mean + self.std * draw.normal(())).exp()
        wide = sigma.reshape(-1, *(1,) * (target.ndim - 1))
        noisy = target + wide * draw.normal(target.shape[1:])
        error = net.denoise(noisy, sigma, **condition) - target
        weight = (wide.square() + net.sigma_data**2) / (wide * net.sigma_data).square()
        return (weight * error.square()).mean()
