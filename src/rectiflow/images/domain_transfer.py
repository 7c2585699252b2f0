"""Image-to-image transfer: a flow from one set of images to another, seen through features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.flows.couplings import Data, Independent, as_data
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.premetrics import L2, FeatureL2
from rectiflow.flows.sampling import sample
from rectiflow.flows.times import TimeSampler
from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.splits import held_out
from rectiflow.training.evaluation.feature_net import FeatureNet, fit, standardise
from rectiflow.training.flow_matching import FlowMatching

if TYPE_CHECKING:
    from jaxtyping import Float


class DomainTransfer(FlowMatching):
    """Train a flow that carries images of one domain into another, without knowing any pairs.

    Sources and targets are drawn independently. The loss `E|Dh(x_t) (x_1 - x_0 - v(x_t, t))|²`
    asks the velocity v to be right only in what the features h see (`Dh` is their Jacobian), so
    that what tells the domains apart changes and the rest of an image may stay. It is meant for
    style with identity kept, not for exact transport: where h is blind, v is free, and `plain`
    ties it to the ordinary loss.

    Args:
        model: the model to train; its path starts at the sources (rectified, constant speed) and
            it predicts velocities.
        source: images of the domain to start from.
        target: images of the domain to reach.
        features: differentiable map of images `(b, ...)` to features, on the model's device and
            frozen, such as a `domain_classifier`; None trains on the ordinary loss alone.
        plain: weight of the ordinary loss beside the features' loss.
        times: which times are looked at; uniform by default.

    Raises:
        ValueError: a model that predicts something else, or whose path starts elsewhere.

    Example:
        >>> from rectiflow.nets import build
        >>> model = FlowModel(build("mlp", shape=(2,), width=8, depth=1), shape=(2,))
        >>> method = DomainTransfer(model, torch.zeros(9, 2), torch.ones(9, 2), plain=0.1)
        >>> method.phases()[0].name
        'transfer'

    Source: arXiv 2209.03003, section 5.3 (image-to-image translation); `plain` is ours.
    """

    def __init__(
        self,
        model: FlowModel,
        source: Data | Tensor,
        target: Data | Tensor,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        plain: float = 0.1,
        times: TimeSampler | None = None,
    ) -> None:
        if model.prediction != "velocity":
            raise ValueError(
                f"transfer compares velocities, got a model that predicts {model.prediction!r}"
            )
        ends = [float(end(torch.zeros(()))) for end in (model.path.alpha, model.path.sigma)]
        if ends != [0.0, 1.0]:
            raise ValueError(
                f"transfer needs a path that starts at its sources, but {model.path.name!r} has "
                f"alpha(0) = {ends[0]:g} and sigma(0) = {ends[1]:g}: use the rectified path"
            )
        # A target's label says nothing about its partner: only conditional models take it.
        reached = as_data(target) if model.conditional else _Unconditional(as_data(target))
        options: dict[str, Any] = {} if times is None else {"times": times}
        super().__init__(
            model,
            Independent(reached, source=source),
            premetric=L2() if features is None else FeatureL2(features, plain=plain),
            name="transfer",
            **options,
        )


@dataclass(frozen=True)
class _Unconditional:
    """Data without their conditions."""

    data: Data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor) -> Tensor:
        return self.data.batch(indices)

    def condition(self, indices: Tensor) -> dict[str, Tensor]:
        return {}


def transfer(
    model: FlowModel,
    images: Float[Tensor, "b *dims"],
    *,
    steps: int | Sequence[float] | None = None,
    solver: Any = None,
    batch_size: int = 1024,
    **condition: Any,
) -> Float[Tensor, "b *dims"]:
    """Carry images of the source domain into the target domain.

    Args:
        model: a model trained by `DomainTransfer`.
        images: images of the source domain, on the model's device.
        steps: number of steps or grid of times; the model's own by default.
        solver: solver name or object; the model's own by default.
        batch_size: images computed together.
        **condition: one row an image for tensors.

    Returns:
        one image of the target domain for each of the source domain.

    Raises:
        ValueError: images of another shape than the model's.

    Example:
        >>> model = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,))
        >>> transfer(model, torch.zeros(1, 2), steps=4)
        tensor([[1., 1.]])
    """
    return sample(
        model, source=images, steps=steps, solver=solver, batch_size=batch_size, **condition
    )


def domain_classifier(
    source: ImageData | Float[Tensor, "n c h w"],
    target: ImageData | Float[Tensor, "m c h w"],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[FeatureNet, float]:
    """Features that tell two domains apart: the last hidden layer of a small classifier.

    They are what `DomainTransfer` should look through. A fifth of the images is kept from
    training to measure how well the classifier knows the domains; at chance its features mean
    nothing. The paper starts from an ImageNet network; this one learns from the images alone.

    Args:
        source: images of one domain; labels are not used.
        target: images of the other, of the same shape.
        seed: of the weights and the order of the batches.
        progress: called with (step, steps).

    Returns:
        the frozen classifier, whose call gives standardised features, and its accuracy on the
        images kept back.

    Raises:
        ValueError: images of two shapes, or fewer than five in all.

    Source: arXiv 2209.03003, section 5.3 (the latent of a classifier of the two domains).
    """
    ends = [_images(source), _images(target)]
    if ends[0].shape[1:] != ends[1].shape[1:]:
        shapes = " and ".join(str(tuple(images.shape[1:])) for images in ends)
        raise ValueError(f"both domains need images of one shape, got {shapes}")
    labels = np.repeat([0, 1], [len(images) for images in ends]).astype(np.int64)
    if len(labels) < 5:
        raise ValueError(f"two domains need 5 images or more to learn from, got {len(labels)}")
    both = ImageData("domains", np.concatenate(ends), labels, ("source", "target"), None)
    apart = held_out(len(both))
    train, test = both.subset(np.flatnonzero(~apart)), both.subset(np.flatnonzero(apart))
    net = FeatureNet(both.shape, 2, seed=seed)
    accuracy = fit(net, train, test, seed=seed, progress=progress)
    standardise(net, replace(train, labels=None, classes=()))
    return net.eval().requires_grad_(False), accuracy


def _images(data: ImageData | Tensor) -> np.ndarray:
    """All images as float32 in [-1, 1]."""
    if isinstance(data, Tensor):
        return data.detach().cpu().float().numpy()
    return data.batch(torch.arange(len(data))).numpy()
