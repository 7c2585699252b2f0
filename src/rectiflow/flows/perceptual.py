"""Losses that compare the implied data by features, besides the velocities by Huber's rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rectiflow.errors import positive, require
from rectiflow.flows.data_premetrics import implied_error
from rectiflow.flows.fields import evaluating
from rectiflow.flows.paths import TINY
from rectiflow.flows.premetrics import Regression, vector_huber

if TYPE_CHECKING:
    from jaxtyping import Float


@runtime_checkable
class Distance(Protocol):
    """How different images look."""

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """One number a pair of images, shape `(b,)`; 0 for equal ones."""


@dataclass(frozen=True)
class FeatureDistance:
    """The mean squared difference of features that were scaled to unit length.

    A layer's features `(b, d, ...)` are normalised over d, their squared differences summed over d
    and averaged over places; several layers are averaged. The network's weights and the second
    images get no gradient, and it runs in evaluation mode.

    Args:
        features: any map of images to a tensor `(b, d, ...)` or to a sequence of them.

    Raises:
        ValueError: on use, when no gradient comes back through the features.

    Example:
        >>> FeatureDistance(nn.Identity()).distance(torch.tensor([[3.0, 0]]), torch.eye(2)[1:])
        tensor([2.])

    Source: arXiv 1801.03924, equation 1, without its learned weights.
    """

    features: Callable[[Tensor], Any]

    def distance(
        self, images: Float[Tensor, "b *dims"], others: Float[Tensor, "b *dims"]
    ) -> Float[Tensor, " b"]:
        layers = self._layers(images)
        with torch.no_grad():
            references = self._layers(others)
        if images.requires_grad and not any(layer.requires_grad for layer in layers):
            raise ValueError(
                "the features give no gradient: pass the network itself (such as features.net), "
                "not a function that switches gradients off"
            )
        total = torch.zeros(len(images), dtype=layers[0].dtype, device=images.device)
        for seen, wanted in zip(layers, references):
            squared = (_unit(seen) - _unit(wanted)).square().sum(1)
            total = total + squared.reshape(len(images), -1).mean(1)
        return total / len(layers)

    def _layers(self, images: Tensor) -> Sequence[Tensor]:
        if isinstance(self.features, nn.Module):
            frozen = {name: p.detach() for name, p in self.features.named_parameters()}
            with evaluating(self.features):
                found = torch.func.functional_call(self.features, frozen, (images,))
        else:
            found = self.features(images)
        return [found] if isinstance(found, Tensor) else list(found)


def _unit(features: Tensor) -> Tensor:
    """Features of length one over the second dimension; the constant keeps zeros differentiable."""
    return features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt()


@dataclass(frozen=True)
class LPIPSDistance:
    """LPIPS on images in [-1, 1], resized first; see `lpips_distance`.

    Args:
        net: a module `net(images, others) -> (b, ...)` for images of three channels in [-1, 1].
        size: side to which images are resized; None keeps theirs.
    """

    net: nn.Module
    size: int | None = 224

    def distance(
        self, images: Float[Tensor, "b c h w"], others: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, " b"]:
        return self.net(self._fit(images), self._fit(others)).flatten(1).mean(1)

    def _fit(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS takes images of 1 or 3 channels, got {images.shape[1]}")
        images = images.expand(-1, 3, -1, -1)
        if self.size is None or tuple(images.shape[2:]) == (self.size, self.size):
            return images
        return nn.functional.interpolate(
            images, (self.size, self.size), mode="bilinear", align_corners=False
        )


def lpips_distance(
    net: str = "vgg",
    *,
    size: int | None = 224,
    average_pooling: bool = True,
    device: torch.device | str = "cpu",
) -> LPIPSDistance:
    """LPIPS from the `lpips` package, set up as the paper uses it.

    The package downloads the weights of its network when it is first used.

    Args:
        net: vgg, alex or squeeze.
        size: side to which images are resized; None keeps theirs.
        average_pooling: pool by means where the network takes maxima, which smooths gradients.
        device: where the network goes: that of the training.

    Raises:
        MissingExtraError: without the `lpips` extra.

    Source: arXiv 2405.20320, section 4.2; arXiv 1801.03924.
    """
    require("lpips", "lpips")
    import lpips

    made = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
    if average_pooling:
        for parent in list(made.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.MaxPool2d):
                    pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding)
                    setattr(parent, name, pool)
    return LPIPSDistance(made.to(device), size)


def as_distance(features: Distance | Callable[[Tensor], Any]) -> Distance:
    """A distance as it is; a feature map as the distance of its features."""
    return features if isinstance(features, Distance) else FeatureDistance(features)


@dataclass(frozen=True)
class Perceptual:
    """The distance of the implied data from the target, as features see it, and nothing else.

    Args:
        features: a feature network, or a distance such as `lpips_distance()`.

    Source: arXiv 2405.20320, section 4.2 (its plain LPIPS loss).
    """

    features: Distance | Callable[[Tensor], Any]

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        return as_distance(self.features).distance(regression.estimate, regression.target)


@dataclass(frozen=True)
class PerceptualHuber:
    """Pseudo-Huber on velocities plus a distance of the implied data as features see it.

    With n = 1 - t the noise level (on other paths that of equal signal to noise, `sigma / (alpha +
    sigma)`): `(1 - n) huber + distance`, or with `inverse_time` `(1 - n) huber + distance / n`,
    which weighs the nearly finished images more. Only for pairs made by a flow, where every
    premetric has the same optimum. Never judge the result by the features it was trained with.

    Args:
        features: a feature network, or a distance such as `lpips_distance()`.
        inverse_time: divide the distance by the noise level (held above 1e-5).
        c: the turning point of the Huber loss; None takes 0.00054 times the dimensions.

    Example:
        >>> loss = PerceptualHuber(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)))

    Source: arXiv 2405.20320, section 4.2 (LPIPS-Huber and LPIPS-Huber-1/t), whose t is our 1 - t.
    """

    features: Distance | Callable[[Tensor], Any]
    inverse_time: bool = False
    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None:
            positive("c", self.c)

    def __call__(self, regression: Regression) -> Float[Tensor, " b"]:
        alpha, sigma = (f(regression.t) for f in (regression.path.alpha, regression.path.sigma))
        noise = sigma / (alpha + sigma)
        distance = Perceptual(self.features)(regression)
        if self.inverse_time:
            distance = distance / noise.clamp(min=TINY)
        huber = vector_huber(implied_error(regression, "velocity"), self.c)
        return (1 - noise) * huber + distance
