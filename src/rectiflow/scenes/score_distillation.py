"""Score distillation: a frozen flow says which way an image, or what drew it, should go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import unknown
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.guided import refuse_memory
from rectiflow.flows.paths import Path, expand, guard
from rectiflow.optim.pixelwise_clipping import PixelwiseClip
from rectiflow.optim.score_distillation import score_distillation_loss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Weight = Callable[[Path, "Tensor"], "Tensor"]
WEIGHTS: dict[str, Weight] = {
    "variance": lambda path, t: path.sigma(t).square(),
    "signal-variance": lambda path, t: path.alpha(t) * path.sigma(t).square(),
    "inverse-variance": lambda path, t: 1 / guard(path.sigma(t).square()),
    "velocity": lambda path, t: (
        path.dalpha(t) * path.sigma(t) / guard(path.alpha(t)) - path.dsigma(t)
    ).abs(),
    "uniform": lambda path, t: torch.ones_like(t),
}
KINDS = ("sds", "csd")


@dataclass(eq=False)
class ScoreDistillation:
    """A loss whose gradient draws images toward what a frozen flow takes for data.

    Noise is added to an image (to its latent, with an encoder) at a random time; the flow says
    what noise it sees, and `G = w(t) (seen - added)` is the gradient. It goes on through the
    encoder to whatever drew the image: a texture, a scene, the image itself. Encoders pass some
    pixels enormous gradients; `clip` bounds them where they leave the encoder.

    Any path and prediction serves: velocities are read as the noises they imply. The times are
    this library's, 1 is data; the paper's range 0.02 to 0.98 is the same both ways round.

    The gradient of what is frozen is of no use: give encoders `requires_grad_(False)`.

    Args:
        model: the flow.
        field: a guided field around it, to be followed in its place.
        encode: what makes samples of the model from images; the images themselves by default.
        clip: the bound on each pixel's gradient, on its way out of the encoder; None for none.
        kind: "sds", or "csd" for `w(t) (seen with the condition - seen without)`, the classifier
            part of guidance alone.
        weight: w, one of `WEIGHTS` or a function of path and times. Of the noise's variance (the
            paper's), signal times variance, one over the variance, that of the velocity's
            residual, or 1.
        times: range that times are drawn from.

    Attributes:
        unclipped: the images' gradient in the last backward pass, before `clip`.

    Raises:
        ValueError: unknown names, times out of order or range, a field with momentum or with parts
            that take turns, csd with a field or on a model without condition.

    Example:
        >>> model = FlowModel(lambda x, t: (1 - x) / (1 - t.view(-1, 1)), shape=(2,))
        >>> distil = ScoreDistillation(model)
        >>> image = torch.zeros(4, 2, requires_grad=True)
        >>> distil(image, generator=torch.Generator().manual_seed(0)).backward()
        >>> bool((image.grad < 0).all())
        True

    Source: SDS: arXiv 2209.14988, section 3; the bound: arXiv 2310.12474, whose code has a scale of
        guidance that is one less than ours; CSD: arXiv 2310.19415.
    """

    model: FlowModel
    field: Any = None
    encode: Callable[[Tensor], Tensor] | None = None
    clip: PixelwiseClip | None = None
    kind: str = "sds"
    weight: str | Weight = "variance"
    times: tuple[float, float] = (0.02, 0.98)
    unclipped: Tensor | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of score distillation", self.kind, KINDS)
        if isinstance(self.weight, str) and self.weight not in WEIGHTS:
            raise unknown("weight of score distillation", self.weight, WEIGHTS)
        first, last = self.times
        if not 0 <= first <= last <= 1:
            raise ValueError(f"times must be in [0, 1] and in order, got {self.times}")
        refuse_memory(self.field, "score distillation draws its times at random")
        if getattr(self.field, "alternates", False):
            raise ValueError(
                "views that take turns have none at random times: combine them by mean"
            )
        if self.kind == "csd" and self.field is not None:
            raise ValueError("csd is guidance alone, of infinite scale: leave the field out")
        if self.kind == "csd" and not self.model.conditional:
            raise ValueError("csd compares a condition with none: give a conditional model, or sds")

    def __call__(
        self,
        images: Float[Tensor, "b *dims"],
        *,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Float[Tensor, ""]:
        """The loss of images in [-1, 1]; summed over them, so that each has its own gradient.

        Args:
            images: with a graph.
            generator: the source of randomness.
            **condition: one row an image for tensors.

        Raises:
            ValueError: samples of a shape that the model does not take.
        """
        samples = self._entered(images)
        if self.encode is not None:
            samples = self.encode(samples)
        self.model.check(samples, **condition)
        return score_distillation_loss(samples, self.gradient(samples, generator, **condition))

    @torch.no_grad()
    def gradient(
        self,
        samples: Float[Tensor, "b *dims"],
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Float[Tensor, "b *dims"]:
        """G at one random time and noise a sample."""
        count, path = samples.shape[0], self.model.path
        device = generator.device if generator is not None else samples.device
        share = torch.rand(count, generator=generator, device=device)
        noise = torch.randn(samples.shape, generator=generator, device=device).to(samples)
        first, last = self.times
        t = (first + (last - first) * share).to(samples.device)
        state = path.interpolate(noise, samples.detach(), t)
        field = self.model if self.field is None else self.field
        with evaluating(field, device_of(self.model)):
            seen = field.noise(state, t, **condition)
            if self.kind == "csd":
                noise = field.noise(state, t, **self.model.null_condition(**condition))
        weigh = WEIGHTS[self.weight] if isinstance(self.weight, str) else self.weight
        return weigh(path, expand(t, samples)).to(samples) * (seen - noise)

    def _entered(self, images: Tensor) -> Tensor:
        """The images behind the clip; what comes back to them is kept."""
        if not images.requires_grad:
            return images
        branch = self.clip(images) if self.clip is not None else images
        # A tensor of its own, whose hook comes before the clip's.
        branch = branch.view_as(branch)
        branch.register_hook(self._keep)
        return branch

    def _keep(self, grad: Tensor) -> None:
        self.unclipped = grad.detach()
