"""Domain adaptation: carry features of a new domain to the old one, where the classifier works."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rectiflow.errors import positive
from rectiflow.flows.couplings import Independent, TensorData
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.sampling import sample
from rectiflow.nets import build
from rectiflow.training.flow_matching import FlowMatching
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.trainer import Trainer, TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SETTINGS = TrainerSettings(
    steps=2000,
    batch_size=128,
    optim=OptimizerSettings(learning_rate=1e-3, schedule="cosine"),
)


class FeatureAdaptation:
    """Lets a trained classifier work on a new domain for which there are no labels.

    A flow learns to carry the features (penultimate layer) of the new domain to the distribution
    of the old domain's features; the classifier's last layer then judges the carried features.
    It helps where the domains differ by a shift that keeps each class nearest to itself, and
    cannot know better where the shift exchanges classes.

    Args:
        head: the classifier's last layer: features `(n, d)` to logits `(n, classes)`.
        width: hidden width of the flow's network.
        depth: its residual blocks.
        steps: Euler steps of the transport.
        settings: how the flow is trained; 2,000 steps of 128 by default. Its seed also decides
            the first weights.

    Raises:
        ValueError: a size that is not positive.

    Example:
        >>> head = lambda features: torch.stack([-features[:, 0], features[:, 0]], 1)
        >>> few = TrainerSettings(steps=5, batch_size=8)
        >>> adapted = FeatureAdaptation(head, width=8, depth=1, steps=4, settings=few)
        >>> old, new = torch.randn(40, 2), torch.randn(40, 2) + 3
        >>> adapted.fit(new, old).predict(new).shape
        torch.Size([40])

    Source: arXiv 2209.03003, section 5.4 (domain adaptation).
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        *,
        width: int = 128,
        depth: int = 2,
        steps: int = 100,
        settings: TrainerSettings | None = None,
    ) -> None:
        for name, value in (("width", width), ("depth", depth), ("steps", steps)):
            positive(name, value)
        self.head, self.width, self.depth, self.steps = head, width, depth, steps
        self.settings = settings if settings is not None else SETTINGS
        self.model: FlowModel | None = None

    def fit(self, new: Float[Tensor, "n d"], old: Float[Tensor, "m d"]) -> FeatureAdaptation:
        """Train the flow from features of the new domain to features of the old; returns self.

        Args:
            new: features of unlabelled samples of the new domain.
            old: features of samples of the domain the classifier was trained on.

        Raises:
            ValueError: no rows, or features of two widths.
        """
        if new.ndim != 2 or old.ndim != 2 or new.shape[1] != old.shape[1]:
            raise ValueError(
                "features of both domains must be (rows, width) of one width, got "
                f"{tuple(new.shape)} and {tuple(old.shape)}"
            )
        if not len(new) or not len(old):
            raise ValueError(f"both domains need rows, got {len(new)} new and {len(old)} old")
        dtype = torch.get_default_dtype()
        new, old = new.to(dtype), old.to(dtype)
        # One map for both ends: the transport takes place among features of unit scale.
        self.centre = old.mean(0)
        self.scale = (old - self.centre).square().mean().sqrt().clamp(min=1e-12)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            net = build("mlp", shape=(old.shape[1],), width=self.width, depth=self.depth)
        coupling = Independent(TensorData(self._scaled(old)), TensorData(self._scaled(new)))
        start = FlowModel(net, shape=(old.shape[1],))
        trainer = Trainer(FlowMatching(start, coupling), self.settings, title="adapt")
        self.model = trainer.fit()
        return self

    def transport(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Features of the new domain, carried to where the old domain has them.

        Raises:
            ValueError: called before `fit`.
        """
        if self.model is None:
            raise ValueError("nothing to transport by: call fit(new, old) first")
        source = self._scaled(features).to(device_of(self.model))
        carried = sample(self.model, source=source, steps=self.steps, solver="euler")
        return carried.to(features) * self.scale.to(features) + self.centre.to(features)

    def predict(self, features: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The classes that the head gives to carried features.

        Raises:
            ValueError: called before `fit`.
        """
        with torch.no_grad():
            return self.head(self.transport(features)).argmax(1)

    def _scaled(self, features: Tensor) -> Tensor:
        centre, scale = (value.to(features.device) for value in (self.centre, self.scale))
        return (features.to(centre.dtype) - centre) / scale
