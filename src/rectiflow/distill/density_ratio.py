"""The ratio of data to generator density, from a discriminator that looks through the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rectiflow.distill.teachers import frozen, model_inside
from rectiflow.errors import positive, unknown
from rectiflow.flows.fields import Field, evaluating
from rectiflow.nets.blocks import group_norm

if TYPE_CHECKING:
    from jaxtyping import Float

LogRatio = Callable[..., Tensor]
"""`log_ratio(x, t, **condition) -> (b,)`: the log of data over generator density at (x, t)."""


def constant_ratio(
    x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
) -> Float[Tensor, " b"]:
    """The log-ratio 0 everywhere: every divergence becomes the reverse Kullback-Leibler one.

    Example:
        >>> constant_ratio(torch.ones(2, 3), torch.zeros(2))
        tensor([0., 0.])
    """
    return x.new_zeros(x.shape[0])


@dataclass(frozen=True)
class RatioClip:
    """Bounds that keep a saturated discriminator from ruling a step.

    Args:
        logit: largest absolute logit; NaN counts as 0.
        low: smallest ratio.
        high: largest ratio.

    Raises:
        ValueError: bounds that are not `0 < low <= 1 <= high`.

    Example:
        >>> RatioClip()(torch.tensor([-50.0, 0.0, 50.0]))
        tensor([ 0.1000,  1.0000, 20.0000])

    Source: arXiv 2502.15681, official code: logits within ±10, ratios within [0.1, 20].
    """

    logit: float = 10.0
    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        positive("logit", self.logit)
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise ValueError(
                f"ratio bounds need 0 < low <= 1 <= high, got low={self.low:g}, high={self.high:g}"
            )

    def __call__(self, logits: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The ratios of logits, without a gradient."""
        bounded = torch.nan_to_num(logits.detach().float(), nan=0.0).clamp(-self.logit, self.logit)
        return bounded.exp().clamp(self.low, self.high)

    @property
    def reach(self) -> tuple[float, float]:
        """The smallest and largest ratio after division by a mean of ratios."""
        return self.low / self.high, self.high / self.low


class Features:
    """What the discriminator looks at: modules of the teacher's net, or a function of your own.

    Named modules are read while the teacher is evaluated anyway, so their features cost nothing.
    The first call of a module and its first rows count: guided fields evaluate the condition
    first, before or above the null condition.

    Args:
        source: dotted names of modules inside `net`, or `features(x, t, **condition)` giving one
            tensor or several.
        net: the teacher's network, for names.

    Raises:
        ValueError: a name that the network does not have, or names without a network.
    """

    def __init__(
        self, source: str | Sequence[str] | Callable[..., Any], net: nn.Module | None = None
    ) -> None:
        self.function = source if callable(source) else None
        self.modules: list[nn.Module] = []
        if callable(source):
            return
        for name in [source] if isinstance(source, str) else source:
            if not isinstance(net, nn.Module):
                raise ValueError(
                    f"features name the module {name!r}, but the teacher has no network to look "
                    "into: give a function features(x, t, **condition)"
                )
            self.modules.append(_submodule(net, name))

    def watch(
        self,
        evaluate: Callable[[], Any] | None,
        x: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
        condition: dict[str, Any],
    ) -> tuple[Any, list[Tensor]]:
        """Run `evaluate` (the teacher at x, t); return its result and the features seen."""
        if self.function is not None:
            with torch.no_grad():
                result = evaluate() if evaluate is not None else None
            found = self.function(x, t, **condition)
            return result, [found] if isinstance(found, Tensor) else list(found)
        assert evaluate is not None
        with _hooked(self.modules) as seen:
            result = evaluate()
        if len(seen) < len(self.modules):
            raise ValueError(
                "a module named by features was not called when the teacher was evaluated: name "
                "one on the way to its output"
            )
        return result, [seen[index][: x.shape[0]] for index in range(len(self.modules))]


def _submodule(net: nn.Module, name: str) -> nn.Module:
    known = dict(net.named_modules())
    if name not in known:
        raise unknown(f"module of {type(net).__name__}", name, filter(None, known))
    return known[name]


@contextmanager
def _hooked(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """First outputs of modules during the block.

    Of several tensors the last counts: blocks of two streams give text first, then image.
    """
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                output = [part for part in output if isinstance(part, Tensor)][-1]
            seen.setdefault(index, output)

        return hook

    handles = [m.register_forward_hook(keep(index)) for index, m in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def default_features(net: Any) -> str:
    """The module of a network that a discriminator looks at unless told otherwise.

    The middle of a U-Net, the last block of a stack of blocks; of a network around another one,
    that of the other, and of two in series that of the first.

    Raises:
        ValueError: a network with neither.

    Example:
        >>> from rectiflow.nets import MLP
        >>> default_features(MLP(shape=(2,), width=8, depth=3))
        'blocks.2'
    """
    for name in ("middle", "mid_block", "blocks", "transformer_blocks"):
        found = getattr(net, name, None)
        if isinstance(found, nn.ModuleList | nn.Sequential) and len(found):
            return f"{name}.{len(found) - 1}"
        if isinstance(found, nn.Module):
            return name
    for name in ("net", "module", "first"):
        found = getattr(net, name, None)
        if isinstance(found, nn.Module):
            return f"{name}.{default_features(found)}"
    raise ValueError(
        f"no module of {type(net).__name__} is known to give features: name one by features=..., "
        "or give a function features(x, t, **condition)"
    )


class Discriminator(nn.Module):
    """One logit a sample from features: convolutions on maps, an MLP on vectors and tokens.

    Trained with `softplus(logit of fakes) + softplus(-logit of reals)` it tends to the log of the
    ratio of real to fake density. Several features have a head each, whose logits are averaged. It
    starts at logit 0, the ratio 1.

    Args:
        shapes: shape of each feature without the batch: (d,), (tokens, d) or (channels, h, w).
        width: hidden width; that of the feature by default.
        depth: hidden layers of the heads on vectors.

    Raises:
        ValueError: features of another number of dimensions.

    Example:
        >>> net = Discriminator([(16,), (8, 4, 4)])
        >>> net([torch.randn(3, 16), torch.randn(3, 8, 4, 4)])
        tensor([0., 0., 0.], grad_fn=<...>)

    Source: arXiv 2502.15681, official code (convolutions of stride 2 down to 4x4, one over all of
        it, group norm and SiLU between, one logit). Ours has no norm after the last of them.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], *, width: int | None = None, depth: int = 2
    ) -> None:
        super().__init__()
        positive("depth", depth)
        heads: list[nn.Module] = []
        for shape in shapes:
            if len(shape) == 3:
                heads.append(_map_head(*shape, width=width or shape[0]))
            elif len(shape) in (1, 2):
                heads.append(_vector_head(shape[-1], width or shape[-1], depth))
            else:
                raise ValueError(
                    "features must be vectors (d,), tokens (n, d) or maps (channels, h, w), got "
                    f"shape {tuple(shape)}"
                )
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> Float[Tensor, " b"]:
        logits = [head(seen).flatten(1).mean(1) for head, seen in zip(self.heads, features)]
        return torch.stack(logits).mean(0)


def _vector_head(inputs: int, width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(width if index else inputs, width), nn.SiLU()]
    return nn.Sequential(*layers, _silent(nn.Linear(width, 1)))


def _map_head(channels: int, height: int, width_of_map: int, *, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = channels
    while min(height, width_of_map) > 4:
        layers += [
            nn.Conv2d(inputs, width, 4, stride=2, padding=1),
            group_norm(width),
            nn.SiLU(),
        ]
        inputs, height, width_of_map = width, height // 2, width_of_map // 2
    # No norm on the 1x1 map, where a group of one number would always be 0.
    layers += [nn.Conv2d(inputs, width, (height, width_of_map)), nn.SiLU()]
    return nn.Sequential(*layers, _silent(nn.Conv2d(width, 1, 1)))


def _silent(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def discriminator_loss(fake: Float[Tensor, " b"], real: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """`mean softplus(fake logits) + mean softplus(-real logits)`.

    Example:
        >>> discriminator_loss(torch.zeros(2), torch.zeros(2))
        tensor(1.3863)
    """
    softplus = nn.functional.softplus
    return softplus(fake).mean() + softplus(-real).mean()


class Judge:
    """A teacher whose evaluation also yields the logits of a discriminator on its features.

    Args:
        teacher: the field, perhaps guided.
        features: what is seen: see `Features`; the middle of the teacher's net by default.

    Attributes:
        discriminator: the module from features to logits; set it before asking for logits.
    """

    def __init__(self, teacher: Field, features: Any = None) -> None:
        self.teacher, self.inside = teacher, model_inside(teacher)
        net = self.inside.net if self.inside is not None else None
        self.features = Features(features or default_features(net), net)
        self.discriminator: nn.Module = nn.Identity()

    def estimate(
        self,
        x: Float[Tensor, "b *dims"],
        t: Float[Tensor, " b"],
        condition: dict[str, Any],
        *,
        gradient: bool,
    ) -> tuple[Float[Tensor, "b *dims"], Float[Tensor, " b"]]:
        """The teacher's estimate of the data and the logits, from one evaluation.

        Args:
            x: states.
            t: their times.
            condition: their conditions.
            gradient: whether the logits keep their gradient to x; never to any weights.
        """

        def evaluate() -> Tensor:
            return self.teacher.denoise(x, t, **condition)

        with (
            torch.set_grad_enabled(gradient),
            evaluating(self.inside),
            frozen(self.inside, self.discriminator),
        ):
            found, seen = self.features.watch(evaluate, x, t, condition)
            return found.detach(), self.discriminator(seen)

    def logits(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], condition: dict[str, Any]
    ) -> Float[Tensor, " b"]:
        """The logits with a gradient to the discriminator alone."""
        return self.discriminator(self.look(x, t, condition))

    @torch.no_grad()
    def look(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], condition: dict[str, Any]
    ) -> list[Tensor]:
        """The features alone, under the condition and without guidance."""
        inside = self.inside
        with evaluating(inside):
            if inside is None or self.features.function is not None:
                return self.features.watch(None, x, t, condition)[1]
            return self.features.watch(lambda: inside(x, t, **condition), x, t, condition)[1]
