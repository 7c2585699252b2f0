"""Networks from words, such as `unet-7m` or `mlp:width=48,depth=2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rectiflow.nets.registry import build, defaults

if TYPE_CHECKING:
    from torch import nn


def build_spec(text: str, *, shape: Sequence[int], classes: int = 0) -> nn.Module:
    """Make a network from a name and plain arguments in one word.

    Args:
        text: a net or size, and after a colon its arguments: `unet:width=96,multipliers=1-2-2`.
            Numbers joined by hyphens make a tuple, `none` an empty one.
        shape: the shape of one sample.
        classes: number of class labels; 0 for an unconditional network.

    Raises:
        ValueError: an unknown name or argument, an argument without a value, or one that the
            data decide.

    Example:
        >>> net = build_spec("mlp:width=48,depth=2,activation=gelu", shape=(2,))
        >>> net.config["width"], net.config["activation"]
        (48, 'gelu')
    """
    name, config = parse_spec(text)
    for key in ("shape", "classes"):
        if key in config:
            raise ValueError(f"the network {text!r} takes {key} from the data: leave {key} out")
    usual = defaults(name)
    config = {key: _fitting(value, usual.get(key)) for key, value in config.items()}
    given = {"shape": tuple(shape), "classes": classes} if classes else {"shape": tuple(shape)}
    return build(name, **config, **given)


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a network in one word.

    Example:
        >>> parse_spec("mlp:width=48")
        ('mlp', {'width': 48})
    """
    name, _, rest = text.partition(":")
    config: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"the network {text!r} needs arguments like width=48, got {part!r}")
        config[key] = _value(value)
    return name, config


def _fitting(value: Any, usual: Any) -> Any:
    """A value as the argument wants it, by the argument's default."""
    if isinstance(usual, tuple):
        return () if value == "none" else (value,) if isinstance(value, int) else value
    return None if value == "none" and usual is None else value


def _value(text: str) -> Any:
    """A number, a truth value, a tuple of whole numbers or the word itself."""
    if text in ("true", "false"):
        return text == "true"
    if "-" in text.strip("-") and text.replace("-", "").isdigit():
        return tuple(int(one) for one in text.split("-"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
