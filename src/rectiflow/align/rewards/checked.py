"""The border between a sampler and any callable that judges its images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class Reward(Protocol):
    """Judges images: the more the better.

    Images are floats, about in [-1, 1]; the condition is what they were made for: `label`, or
    `prompt` as row numbers of a table.
    """

    def __call__(self, images: Tensor, **condition: Any) -> Tensor:
        """One number an image, shape `(b,)`."""


class Checked:
    """Any callable as a reward whose every answer is checked.

    Conditions that the callable does not name are not handed to it, so `lambda images: ...` is a
    reward too.

    Args:
        reward: from images, and conditions by name, to numbers of shape `(b,)`.
        differentiable: demand that the answer depends on the images in a way that can be followed
            backward; policy gradients do without.

    Raises:
        ValueError: when called: an answer that is no tensor, of another shape, not finite, or
            without gradient where one is needed; a condition that the reward needs and lacks.

    Example:
        >>> import torch
        >>> Checked(lambda images: images.flatten(1).mean(1))(torch.ones(2, 1, 2, 2), label=None)
        tensor([1., 1.])
    """

    def __init__(self, reward: Any, *, differentiable: bool = True) -> None:
        if not callable(reward):
            raise ValueError(f"a reward must be callable, got {type(reward).__name__}")
        self.reward, self.differentiable = reward, differentiable
        self._named, self._needed, self._any = _conditions(reward)

    def __call__(self, images: Float[Tensor, "b *dims"], **condition: Any) -> Float[Tensor, " b"]:
        missing = sorted(self._needed - condition.keys())
        if missing:
            given = ", ".join(condition) or "none"
            raise ValueError(
                f"the reward needs the condition {missing[0]!r}, and the model is given {given}: "
                "align a model with this condition or take a reward without it"
            )
        known = {n: v for n, v in condition.items() if self._any or n in self._named}
        value = self.reward(images, **known)
        if not isinstance(value, Tensor):
            raise ValueError(f"a reward must return a tensor, got {type(value).__name__}")
        if value.shape != images.shape[:1]:
            raise ValueError(
                f"a reward must return one number an image, shape ({images.shape[0]},), got "
                f"{tuple(value.shape)}: take the mean over everything but the first dimension"
            )
        bad = int((~value.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"the reward of {bad} of {len(value)} images is NaN or infinite: bound it, or add "
                "a range penalty if the images have left [-1, 1]"
            )
        if self.differentiable and images.requires_grad and not value.requires_grad:
            raise ValueError(
                "the reward has no gradient with respect to the images: remove no_grad, detach and "
                "rounding from it, or train with Reinforce, which needs none"
            )
        return value.to(images.dtype)


def _conditions(reward: Any) -> tuple[set[str], set[str], bool]:
    """Conditions that a callable names, those without a default, and whether it takes any."""
    target = getattr(reward, "forward", reward)
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return set(), set(), False
    named, needed = set(), set()
    for index, one in enumerate(parameters.values()):
        keyword = one.kind is one.KEYWORD_ONLY or (
            one.kind is one.POSITIONAL_OR_KEYWORD and index > 0
        )
        if keyword:
            named.add(one.name)
            if one.default is one.empty:
                needed.add(one.name)
    return named, needed, any(p.kind is p.VAR_KEYWORD for p in parameters.values())
