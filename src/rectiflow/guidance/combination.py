"""How the answers of several views become one: weights, and the variance that averaging loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import positive, unknown
from rectiflow.flows.paths import expand
from rectiflow.vectors import combine, inner

if TYPE_CHECKING:
    from jaxtyping import Float, Int

REPAIRS = ("none", "official", "matched")
LOOKED_AT = ("data", "state")
# Rounds of the search for the shortest mean of three or more.
ROUNDS = 20


def balanced_weights(
    scores: Float[Tensor, "views b"], share: Float[Tensor, " b"] | float, *, floor: float = 1e-3
) -> Float[Tensor, "views b"]:
    """Weights by which views that show their condition less count more, the later the more so.

    `w_i = s_i^-(1 + share)`, divided by their sum. Equal scores give equal weights.

    Args:
        scores: how well each view shows its condition.
        share: of the sampling that is done, 0 to 1.
        floor: the least score; scores of a cosine may be negative.

    Returns:
        weights that sum to one over the views.

    Example:
        >>> balanced_weights(torch.tensor([[0.2], [0.6]]), 0.0).flatten()
        tensor([0.7500, 0.2500])

    Source: arXiv 2412.02693, section 3 (noise vector balancing); its code divides the number of
        the step by 30, here it is divided by the number of steps.
    """
    return torch.softmax(-(1 + share) * scores.clamp(min=floor).log(), 0)


def min_norm_weights(vectors: Float[Tensor, "views b *dims"]) -> Float[Tensor, "views b"]:
    """The weights, none negative and of sum one, whose mean of the vectors is shortest.

    Moving along that mean is uphill for every task, until no direction is. Weight is moved from
    one vector to another, pair by pair: exact for two, a fixed number of rounds for more.

    Example:
        >>> min_norm_weights(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])).flatten()
        tensor([0.8000, 0.2000])

    Source: multiple-gradient descent as in arXiv 1810.04650, section 3; the search is ours.
    """
    flat = vectors.flatten(2).transpose(0, 1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    products = flat @ flat.transpose(1, 2)
    count = len(vectors)
    weights = products.new_full(products.shape[:2], 1 / count)
    least = torch.finfo(products.dtype).tiny
    for _ in range(ROUNDS if count > 2 else 1):
        for i, j in combinations(range(count), 2):
            slope = products @ weights[..., None]
            curved = products[:, i, i] + products[:, j, j] - 2 * products[:, i, j]
            moved = (slope[:, j, 0] - slope[:, i, 0]) / curved.clamp(min=least)
            moved = torch.maximum(torch.minimum(moved, weights[:, j]), -weights[:, i])
            change = torch.zeros_like(weights)
            change[:, i], change[:, j] = moved, -moved
            weights = weights + change
    return weights.T


def rectified(
    noises: Float[Tensor, "views b *dims"], weights: Float[Tensor, "views b"] | None, kind: str
) -> Float[Tensor, "b *dims"]:
    """The weighted mean of noises, with the variance back that averaging takes from it.

    Samplers that add noise count on predictions of variance one, and the mean of two that have
    nothing in common has one half. `official` divides by the root of the variance that the mean
    would have if every prediction had variance one,
    `sum w_i² + 2 sum_{i<j} w_i w_j mean(e_i e_j)`; where they have less, as those of good models
    have near the data, it amplifies even predictions that agree. `matched` brings the mean square
    to that of the predictions, `sum w_i mean(e_i²)`, and so leaves those that agree alone.

    Args:
        noises: the predictions, brought back from their views.
        weights: of sum one over the views; equal ones if None.
        kind: none, official or matched.

    Raises:
        ValueError: another kind.

    Example:
        >>> noises = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> rectified(noises, None, "matched"), rectified(noises, None, "official")
        (tensor([[1.4142, 0.0000]]), tensor([[1.4142, 0.0000]]))

    Source: arXiv 2412.02693, section 3 (noise variance rectification); `matched` is ours.
    """
    if kind not in REPAIRS:
        raise unknown("rectification", kind, REPAIRS)
    if kind != "official":
        return combine(noises, weights, match=kind == "matched")
    if weights is None:
        weights = noises.new_full(noises.shape[:2], 1 / len(noises))
    mean = combine(noises, weights)
    size = max(1, mean[0].numel())
    alone = weights.square() * (1 - inner(noises, noises, start=2) / size)
    # All pairs, i = j among them, are the square of the mean; those of i = j count as one.
    variance = inner(mean, mean) / size + alone.sum(0)
    scale = variance.clamp(min=1e-6).rsqrt()
    return (expand(scale, mean) * mean).to(noises.dtype)


@dataclass(frozen=True, eq=False)
class Balance:
    """How well views show their conditions, as weights of their answers.

    Args:
        score: pictures, with the condition of their view by name, to one number a sample. A
            classifier (`ClassSimilarity`), a CLIP score, any callable; larger is better.
        on: what it looks at in each view: `data`, the estimate of the data from the plain mean of
            the views, for scorers of clean pictures; `state`, the noisy state itself, for scorers
            that are also given the time as `t`.
        floor: the least score, > 0.

    Raises:
        ValueError: an unknown `on`, a floor that is not positive.
    """

    score: Callable[..., Tensor]
    on: str = "data"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if self.on not in LOOKED_AT:
            raise unknown("thing to score", self.on, LOOKED_AT)
        positive("floor", self.floor)

    @torch.no_grad()
    def weights(
        self,
        pictures: Sequence[Float[Tensor, "b *dims"]],
        t: Float[Tensor, " b"],
        conditions: Sequence[Mapping[str, Any]],
        share: Float[Tensor, " b"] | float,
    ) -> Float[Tensor, "views b"]:
        """The weights of what each view shows.

        Raises:
            ValueError: scores of another shape than `(b,)`.
        """
        known = {"t": t} if self.on == "state" else {}
        scores = []
        for picture, condition in zip(pictures, conditions):
            found = self.score(picture, **known, **condition)
            if found.shape != t.shape:
                raise ValueError(
                    f"a score must give one number for each of the {len(t)} samples, got shape "
                    f"{tuple(found.shape)}"
                )
            scores.append(found)
        return balanced_weights(torch.stack(scores), share, floor=self.floor)


@dataclass(frozen=True, eq=False)
class ClassSimilarity:
    """The probability of the wanted class as a score of moderate range, `base + (1 - base) p`.

    Cosines of CLIP differ by a factor of two at most; probabilities by any, which would leave all
    the weight to one view.

    Args:
        logits: from pictures, and the time where it is given, to class scores `(b, classes)`.
        base: the score of probability zero.

    Example:
        >>> score = ClassSimilarity(lambda images: images, base=0.5)
        >>> score(torch.zeros(1, 2), label=torch.tensor([1]))
        tensor([0.7500])
    """

    logits: Callable[..., Tensor]
    base: float = 0.7

    def __call__(
        self,
        images: Float[Tensor, "b *dims"],
        *,
        label: Int[Tensor, " b"],
        t: Float[Tensor, " b"] | None = None,
        **condition: Any,
    ) -> Float[Tensor, " b"]:
        found = self.logits(images) if t is None else self.logits(images, t)
        chance = found.softmax(1).gather(1, label[:, None])[:, 0]
        return self.base + (1 - self.base) * chance
