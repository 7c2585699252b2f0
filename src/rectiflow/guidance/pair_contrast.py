"""The contrastive loss of denoising: each prompt explains its own picture and not the other's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive, unknown
from rectiflow.flows.paths import PREDICTIONS

if TYPE_CHECKING:
    from jaxtyping import Float

    from rectiflow.flows.fields import FlowModel


@dataclass(frozen=True)
class PairLosses:
    """The losses of pairs, one number each.

    Attributes:
        total: what is minimised.
        positive: of each prompt on its own picture, the mean of both.
        negative: of each prompt on the other's picture; None where it was not asked for.
    """

    total: Tensor
    positive: Tensor
    negative: Tensor | None


@dataclass(frozen=True)
class PairContrastiveDenoising:
    """Denoise a pair of pictures well under their own prompts, and badly under exchanged ones.

    `L = lambda_pos L+ - lambda_neg L-`, mean squared errors of what the model predicts: noise,
    velocity, data or v. In L+ prompt k is given picture k, in L- the other one, under the same
    noises and times, so that their difference is due to the pictures alone. Both go through the
    network in one call.

    The negative term has no lower bound: trained for long it drives the prompts to nonsense. Keep
    trainings short, watch the length of what is learned, or bound it by `hinge` or `cap`.

    Args:
        lambda_pos: weight of L+.
        lambda_neg: weight of L-; 0 leaves it out, which is textual inversion by a network.
        hinge: replaces `-L-` by `max(0, hinge - (L- - L+))`, pair by pair: exchanged pictures push
            only while they are explained better than this.
        cap: longest shift as a part of the vector that is shifted; a `RelationFitting` hands it to
            its rectifier, which keeps it.
        space: in what the errors are measured; what the model predicts by default.

    Raises:
        ValueError: weights that are negative or not finite, a hinge or cap that is not positive.

    Example:
        >>> from rectiflow.flows import FlowModel
        >>> model = FlowModel(lambda x, t, *, context: context)
        >>> pictures = torch.tensor([[[1.0], [-1.0]]])
        >>> prompts = {"context": torch.tensor([[1.0], [-1.0]])}
        >>> loss = PairContrastiveDenoising(1.0, 1.0)
        >>> found = loss(model, pictures, torch.zeros_like(pictures), torch.ones(1), prompts)
        >>> found.positive, found.negative, found.total
        (tensor([0.]), tensor([4.]), tensor([-4.]))

    Source: arXiv 2403.20249, section 4.3, weights 10 and 2 of its released code; hinge and cap are
        ours.
    """

    lambda_pos: float = 10.0
    lambda_neg: float = 2.0
    hinge: float | None = None
    cap: float | None = None
    space: str | None = None

    def __post_init__(self) -> None:
        for name in ("lambda_pos", "lambda_neg"):
            value = getattr(self, name)
            positive(name, value, zero=True)
            if value == float("inf"):
                raise ValueError(f"{name} must be finite, got inf")
        if not self.lambda_pos and not self.lambda_neg:
            raise ValueError("lambda_pos and lambda_neg are both 0: there is nothing to learn")
        for name in ("hinge", "cap"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.space is not None and self.space not in PREDICTIONS:
            raise unknown("space", self.space, PREDICTIONS)

    def __call__(
        self,
        model: FlowModel,
        pictures: Float[Tensor, "b 2 *dims"],
        noise: Float[Tensor, "b 2 *dims"],
        t: Float[Tensor, " b"],
        condition: Mapping[str, Any],
    ) -> PairLosses:
        """The losses of pairs.

        Args:
            model: the model; gradients pass through it to the condition.
            pictures: both pictures of each pair, in the model's own space.
            noise: a noise for each prompt of a pair, used in L+ and in L-.
            t: one time a pair.
            condition: two rows a pair, one prompt after the other.
        """
        negative = self.lambda_neg > 0
        target = pictures.flatten(0, 1)
        source, times = noise.flatten(0, 1), t.repeat_interleave(2)
        if negative:
            target = torch.cat([target, pictures.flip(1).flatten(0, 1)])
            source, times = torch.cat([source, source]), torch.cat([times, times])
            condition = {name: torch.cat([v, v]) for name, v in condition.items()}
        x = model.path.interpolate(source, target, times)
        output = model(x, times, **condition).to(x.dtype)
        space = self.space or model.prediction
        if space != model.prediction:
            output = model.path.convert(output, x, times, given=model.prediction, wanted=space)
        wanted = model.path.target_of(space, source, target, times)
        errors = (output - wanted).square().flatten(1).mean(1)
        halves = errors.unflatten(0, (-1, len(t), 2)).mean(-1)
        return self.combine(halves[0], halves[1] if negative else None)

    def combine(
        self, positive: Float[Tensor, " b"], negative: Float[Tensor, " b"] | None
    ) -> PairLosses:
        """The losses of pairs from their two parts."""
        total = self.lambda_pos * positive
        if negative is not None:
            push = negative if self.hinge is None else -(self.hinge - negative + positive).relu()
            total = total - self.lambda_neg * push
        return PairLosses(total, positive, negative)
