"""The probability that a classifier gives to a class, as a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from rectiflow.training.data import ImageData


class Classifier:
    """The log-probability of a class under a classifier.

    Args:
        logits: from images to class scores `(b, classes)`: a module, or any function.
        label: the class that every image should be of.
        shift: without `label`: the class `(label + shift) mod classes` of the image's own
            condition; 0 rewards what was asked for, 1 the class after it.

    Raises:
        ValueError: both or neither of the two given; (when called) a class there is not, or scores
            that are not one row an image.

    Example:
        >>> judge = Classifier(lambda images: images.flatten(1), label=1)
        >>> judge(torch.zeros(1, 1, 1, 4))
        tensor([-1.3863])
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        label: int | None = None,
        *,
        shift: int | None = None,
    ) -> None:
        if (label is None) == (shift is None):
            raise ValueError("give either label, the class for all, or shift, relative to each own")
        self.logits, self.label, self.shift = logits, label, shift

    def __call__(
        self,
        images: Float[Tensor, "b *dims"],
        *,
        label: Int[Tensor, " b"] | None = None,
        **condition: Any,
    ) -> Float[Tensor, " b"]:
        scores = self.logits(images)
        if scores.ndim != 2 or scores.shape[0] != images.shape[0]:
            raise ValueError(
                f"a classifier must return scores of shape ({images.shape[0]}, classes), got "
                f"{tuple(scores.shape)}"
            )
        classes = scores.shape[1]
        if self.label is not None:
            if not 0 <= self.label < classes:
                raise ValueError(f"class must be from 0 to {classes - 1}, got {self.label}")
            return scores.log_softmax(1)[:, self.label]
        if label is None:
            raise ValueError(
                "the reward is relative to each image's label, and the model has none: name a "
                "class, as in classifier:3"
            )
        wanted = (label + (self.shift or 0)) % classes
        return scores.log_softmax(1).gather(1, wanted[:, None])[:, 0]


def fit_linear(data: ImageData, *, penalty: float = 1.0) -> nn.Module:
    """A linear classifier of labelled images: multinomial logistic regression on their pixels.

    The weakest judge that still means something; enough for digits, and easy to deceive, which is
    what a held-out judge is for.

    Args:
        data: labelled images.
        penalty: inverse strength of the L2 penalty, scikit-learn's `C`.

    Returns:
        a frozen module from images to scores `(b, classes)`.

    Raises:
        ValueError: data without labels, or of one class.
    """
    if data.labels is None or len(data.classes) < 2:
        raise ValueError(f"{data.name} has no two classes to tell apart")
    from sklearn.linear_model import LogisticRegression

    pixels = data.batch(torch.arange(len(data))).flatten(1).double().numpy()
    found = LogisticRegression(C=penalty, max_iter=2000).fit(pixels, data.labels)
    linear = nn.Linear(pixels.shape[1], len(data.classes))
    weight = torch.zeros(len(data.classes), pixels.shape[1], dtype=torch.float64)
    # A class without an image is never the answer.
    offset = torch.full((len(data.classes),), -1e4, dtype=torch.float64)
    weights, offsets = torch.tensor(found.coef_), torch.tensor(found.intercept_)
    if len(found.classes_) == 2:
        weights = torch.cat([torch.zeros_like(weights), weights])
        offsets = torch.cat([torch.zeros_like(offsets), offsets])
    weight[found.classes_], offset[found.classes_] = weights, offsets
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(offset)
    return nn.Sequential(nn.Flatten(), linear).requires_grad_(False).eval()
