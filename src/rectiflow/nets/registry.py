"""Networks by name: the built-in ones, their ready-made sizes, and the user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rectiflow import errors

if TYPE_CHECKING:
    from torch import nn

NETS: dict[str, tuple[str, str]] = {
    "mlp": ("rectiflow.nets.mlp", "MLP"),
    "mmdit": ("rectiflow.nets.mmdit", "MMDiT"),
    "stacked": ("rectiflow.nets.stacked", "Stacked"),
    "unet": ("rectiflow.nets.unet", "UNet"),
}

# Networks around other networks: they have no shape of their own. Those of other rooms are named
# here so that model folders open without importing them first.
WRAPPERS: dict[str, tuple[str, str]] = {
    "diffusers": ("rectiflow.interop.diffusers.networks", "PipelineNet"),
    "diffusion": ("rectiflow.nets.diffusion", "DiffusionVelocity"),
    "lora": ("rectiflow.distill.lora", "AdaptedNet"),
}


@dataclass(frozen=True)
class Size:
    """A ready-made size: the arguments of a net, all but the shape of the data.

    Attributes:
        net: name of the net.
        config: its arguments without `shape` and `classes`; any can be overridden.
        shape: the shape of the data it was made for.
        parameters: number of parameters at that shape, without classes.
        use: what it is for, in a few words.
    """

    net: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    parameters: int
    use: str


_SMALL = {"blocks": 1, "attention": (), "dropout": 0.0}
_IMAGES = (1, 28, 28)
_TEXT = {"context_dim": 4096, "pooled_dim": 2048}
_LATENTS = (16, 128, 128)
# The released tables hold 192 (384) positions at a third (sixth) of the distance: 64 patches span
# what 192 (384) would.
_POSITIONS = {"max_size": 192, "position_scale": 64 / 192}


def _slim(width: int, multipliers: tuple[int, ...], blocks: int, parameters: int) -> Size:
    config = {"width": width, "multipliers": multipliers, "blocks": blocks, "attention": (16,)}
    return Size("unet", config, (3, 32, 32), parameters, "32x32, a small student")


sizes: dict[str, Size] = {
    "mlp-2d": Size("mlp", {"width": 64, "depth": 2}, (2,), 29_314, "points in the plane"),
    "mlp-digits": Size("mlp", {"width": 512, "depth": 2}, (1, 8, 8), 1_186_432, "8x8 digits"),
    # Multiply-adds per image: 14, 26 and 125 million.
    "unet-xxs": Size(
        "unet",
        {"width": 16, "multipliers": (1, 2), "patch": 2, **_SMALL},
        _IMAGES,
        181_060,
        "28x28 on a CPU, quickest",
    ),
    "unet-xs": Size(
        "unet",
        {"width": 16, "multipliers": (1, 3), "patch": 2, **_SMALL},
        _IMAGES,
        344_228,
        "28x28 on a CPU",
    ),
    "unet-s": Size(
        "unet",
        {"width": 48, "multipliers": (1, 2), "patch": 2, **_SMALL},
        _IMAGES,
        1_607_620,
        "28x28 on a CPU with patience",
    ),
    "unet-cifar10": Size(
        "unet",
        {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,)},
        (3, 32, 32),
        61_804_419,
        "32x32, the paper's DDPM++",
    ),
    # The sizes of SlimFlow's students (arXiv 2407.12718), beside their 61.8 million teacher above.
    "unet-28m": _slim(128, (1, 2, 2), 2, 27_906_179),
    "unet-16m": _slim(96, (1, 2, 2), 2, 15_707_235),
    "unet-7m": _slim(64, (1, 2, 2), 2, 6_989_891),
    "unet-3m": _slim(64, (1, 1, 2), 1, 3_437_123),
    "unet-256": Size(
        "unet",
        {"width": 128, "multipliers": (1, 1, 2, 2, 2, 2, 2), "blocks": 2, "attention": (16,)},
        (3, 256, 256),
        65_462_915,
        "256x256, the paper's",
    ),
    "mmdit-digits": Size(
        "mmdit", {"depth": 3, "heads": 4, "head_dim": 16}, (1, 8, 8), 423_812, "8x8 digits"
    ),
    "mmdit-2b": Size(
        "mmdit",
        {"depth": 24, **_TEXT, **_POSITIONS},
        _LATENTS,
        2_028_328_000,
        "latents of 1024x1024, Stable Diffusion 3 Medium",
    ),
    "mmdit-8b": Size(
        "mmdit",
        {"depth": 38, "qk_norm": "rms", **_TEXT, **_POSITIONS},
        _LATENTS,
        8_056_627_456,
        "latents of 1024x1024, Stable Diffusion 3.5 Large",
    ),
    "sd3.5-medium": Size(
        "mmdit",
        {
            "depth": 24,
            "qk_norm": "rms",
            "dual_layers": tuple(range(13)),
            "max_size": 384,
            "position_scale": 64 / 384,
            **_TEXT,
        },
        _LATENTS,
        2_243_171_456,
        "latents of 1024x1024, Stable Diffusion 3.5 Medium",
    ),
}

_registered: dict[str, Callable[..., nn.Module]] = {}


def names() -> list[str]:
    """Every name that `build` accepts: nets, wrappers, ready-made sizes, registered ones.

    Example:
        >>> "unet" in names() and "unet-s" in names()
        True
    """
    return sorted({*NETS, *WRAPPERS, *sizes, *_registered})


def build(name: str, **config: Any) -> nn.Module:
    """Make a network from its name and plain arguments.

    This is how model folders, commands and recipes make networks: `build(net.name,
    **net.config)` remakes a net, and the name of a ready-made size stands for its arguments.

    Args:
        name: a net (`unet`), a size (`unet-s`) or a registered name.
        config: the net's keyword arguments; they override those of a size.

    Returns:
        the network, freshly initialised.

    Raises:
        ValueError: an unknown name or argument, a missing or an unacceptable argument.

    Example:
        >>> net = build("mlp", shape=(2,), width=64, depth=2)
        >>> net.name, build("unet-xs", shape=(1, 28, 28)).config["width"]
        ('mlp', 16)
    """
    net = name
    if name in sizes and name not in _registered:
        net, config = sizes[name].net, {**sizes[name].config, **config}
    factory = _factory(net)
    _check_arguments(name, factory, config)
    return factory(**config)


def defaults(name: str) -> dict[str, Any]:
    """The arguments of a net or size that may be left out, with their usual values.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> defaults("mlp-2d")["activation"]
        'silu'
    """
    net = sizes[name].net if name in sizes and name not in _registered else name
    parameters = inspect.signature(_factory(net)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def register(name: str, factory: Callable[..., nn.Module], *, replace: bool = False) -> None:
    """Give a network of your own a name that `build`, commands and model folders accept.

    Args:
        name: the name. A model folder made with it opens only where it was registered.
        factory: a class or function of keyword arguments with JSON values that returns a
            module whose `name` is this name and whose `config` holds the arguments.
        replace: allow a name that is taken.

    Raises:
        ValueError: the name is taken and `replace` is false.

    Example:
        >>> from rectiflow.nets import MLP
        >>> class Mine(MLP):
        ...     name = "mine"
        >>> register("mine", Mine, replace=True)
        >>> type(build("mine", shape=(2,), width=8, depth=1)).__name__
        'Mine'
    """
    if name in names() and not replace:
        raise ValueError(f"a net named {name!r} exists: choose another name or pass replace=True")
    _registered[name] = factory


def _factory(name: str) -> Callable[..., nn.Module]:
    if name in _registered:
        return _registered[name]
    known = NETS | WRAPPERS
    if name not in known:
        raise errors.unknown("net", name, names())
    module, attribute = known[name]
    return getattr(importlib.import_module(module), attribute)


def _check_arguments(name: str, factory: Callable[..., nn.Module], config: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    accepted = [p.name for p in parameters]
    wrong = [key for key in config if key not in accepted]
    if wrong:
        raise ValueError(f"net {name!r} has no {wrong[0]!r}: it takes {', '.join(accepted)}")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in config]
    if missing:
        raise ValueError(f"net {name!r} needs {missing[0]!r}: it takes {', '.join(accepted)}")


def preset_for(shape: tuple[int, ...]) -> str:
    """The ready-made size to begin with for samples of a shape.

    Example:
        >>> preset_for((1, 8, 8)), preset_for((1, 28, 28)), preset_for((3, 256, 256))
        ('mlp-digits', 'unet-xs', 'unet-256')
    """
    if len(shape) != 3:
        return "mlp"
    side = max(shape[1:])
    if side <= 12:
        return "mlp-digits"
    if side <= 28:
        return "unet-xs"
    return "unet-cifar10" if side <= 64 else "unet-256"
