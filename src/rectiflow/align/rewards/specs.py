"""Rewards by words, for commands."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rectiflow.align.rewards.classifier import Classifier
from rectiflow.align.rewards.compressibility import Compressibility
from rectiflow.align.rewards.mixture import RewardMix
from rectiflow.align.rewards.pixels import Brightness
from rectiflow.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("aesthetic", "brightness", "classifier", "clip", "compressibility", "python")


def parse_reward(
    spec: str,
    *,
    classifier: Callable[[], Callable[[Tensor], Tensor]] | None = None,
    texts: Sequence[str] = (),
) -> Any:
    """The reward of a word.

    `brightness`, `brightness:TARGET`, `compressibility`, `compressibility:QUALITY`,
    `classifier:CLASS`, `classifier:own` (the class asked for), `classifier:+1` (the one after it),
    `clip` or `clip:MODEL`, `aesthetic:HEAD` or `aesthetic:HEAD:MODEL`, `python:MODULE.FUNCTION`.

    Args:
        spec: the word.
        classifier: makes the classifier, when one is asked for.
        texts: what `clip` compares with.

    Raises:
        ValueError: an unknown word, or a reward that lacks what it needs.
        FileNotFoundError: a model or weight file that is not there.

    Example:
        >>> parse_reward("brightness:0.5")
        Brightness(target=0.5)
    """
    name, _, rest = spec.partition(":")
    if name not in NAMES:
        raise unknown("reward", name, NAMES)
    try:
        if name == "brightness":
            return Brightness(float(rest) if rest else None)
        if name == "compressibility":
            return Compressibility(int(rest) if rest else 75)
    except ValueError as error:
        raise ValueError(f"{spec!r} is no reward ({error}): see {name}:NUMBER") from None
    if name == "classifier":
        return _classifier(rest, classifier)
    if name == "python":
        return _python(rest)
    from rectiflow.align.rewards.vision import CLIP, Aesthetic, AestheticHead, ClipScore, load_clip

    if name == "clip":
        if not texts:
            raise ValueError("the reward clip needs texts to compare with: give prompts")
        return ClipScore(*load_clip(rest or CLIP), texts)
    head, _, source = rest.partition(":")
    if not head:
        raise ValueError("the reward aesthetic needs its head: aesthetic:FILE[:CLIP]")
    loaded = AestheticHead.load(head)
    return Aesthetic(load_clip(source or CLIP)[0], loaded)


def parse_rewards(specs: Sequence[str], **needed: Any) -> Any:
    """One reward of several words, each `WEIGHT*REWARD` or a reward alone.

    Raises:
        ValueError: as `parse_reward`; a weight that is no number, a reward named twice, or none.

    Example:
        >>> parse_rewards(["brightness", "-0.5*compressibility"]).weights
        {'brightness': 1.0, 'compressibility': -0.5}
    """
    rewards: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for spec in specs:
        weight, star, word = spec.rpartition("*")
        try:
            weights[word] = float(weight) if star else 1.0
        except ValueError:
            raise ValueError(f"{weight!r} is no weight: write 0.5*{word}") from None
        if word in rewards:
            raise ValueError(f"the reward {word!r} is given twice: add up its weights")
        rewards[word] = parse_reward(word, **needed)
    return RewardMix(rewards, weights)


def _classifier(rest: str, make: Callable[[], Callable[[Tensor], Tensor]] | None) -> Classifier:
    if make is None:
        raise ValueError("the reward classifier needs a classifier of the model's data")
    try:
        if rest == "own":
            return Classifier(make(), shift=0)
        if rest.startswith(("+", "-")):
            return Classifier(make(), shift=int(rest))
        return Classifier(make(), int(rest))
    except ValueError as error:
        if "invalid literal" not in str(error):
            raise
        raise ValueError(
            f"classifier takes a class, own or +1, got {rest!r}: see classifier:3"
        ) from None


def _python(rest: str) -> Any:
    """A function of the user's own code."""
    module, _, name = rest.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"no reward at python:{rest} ({error}): name an importable python:MODULE.FUNCTION"
        ) from None
