"""Symmetries of pairs: when a teacher commutes with a flip, flipped pairs are pairs too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rectiflow.errors import unknown
from rectiflow.flows.couplings import Coupling, Draw, Pairs
from rectiflow.nets.base import null_condition_of

if TYPE_CHECKING:
    from jaxtyping import Float

Transform = Callable[[Tensor], Tensor]


def hflip(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images mirrored left to right.

    Raises:
        ValueError: something that is no batch of images.

    Example:
        >>> hflip(torch.tensor([[[[1.0, 2.0]]]]))
        tensor([[[[2., 1.]]]])
    """
    if x.ndim != 4:
        raise ValueError(f"only images (b, c, h, w) can be mirrored, got shape {tuple(x.shape)}")
    return x.flip(3)


TRANSFORMS: dict[str, Transform] = {"hflip": hflip}


def resolve(transform: str | Transform) -> Transform:
    """The transform of a name; a callable is returned as it is."""
    if not isinstance(transform, str):
        return transform
    if transform not in TRANSFORMS:
        raise unknown("symmetry", transform, TRANSFORMS)
    return TRANSFORMS[transform]


@dataclass(frozen=True)
class PairSymmetry:
    """The pairs of another coupling, each transformed with probability one half.

    Use it when the teacher commutes with the transform (it was trained with flips, or is
    `Symmetrized`): then a transformed pair is a pair of the same flow, and a store counts twice.
    Noise and result are transformed together, and every sample has a coin of its own. Mirroring
    left to right suits photographs, turning them upside down does not.

    Args:
        coupling: where pairs come from.
        transform: "hflip", or a map of states that keeps the law of the noise (a flip, a turn, a
            permutation).

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from rectiflow.flows.couplings import Independent
        >>> pairs = PairSymmetry(Independent(torch.arange(4.0).view(2, 1, 1, 2)))
        >>> pairs.draw(Draw.of(2)).target.shape
        torch.Size([2, 1, 1, 2])

    Source: arXiv 2407.12718, section 3.1; the official code has one coin a batch.
    """

    coupling: Coupling
    transform: str | Transform = "hflip"

    def __post_init__(self) -> None:
        resolve(self.transform)

    def draw(self, draw: Draw) -> Pairs:
        pairs = self.coupling.draw(draw)
        coins = draw.uniform() < 0.5
        turned = coins.reshape(-1, *(1,) * (pairs.target.ndim - 1))
        transform = resolve(self.transform)
        return replace(
            pairs,
            source=torch.where(turned, transform(pairs.source), pairs.source),
            target=torch.where(turned, transform(pairs.target), pairs.target),
        )


class Symmetrized(nn.Module):
    """A network averaged over a transform that is its own inverse, and so commuting with it.

    `(net(x, t) + T net(T x, t)) / 2`, at twice the cost. Velocities, noises and data transform
    alike, so any prediction will do.

    Args:
        net: the network.
        transform: "hflip", or a linear map of states with `T T x = x`.

    Example:
        >>> net = Symmetrized(lambda x, t: x * torch.tensor([1.0, 3.0]))
        >>> net(torch.ones(1, 1, 1, 2), torch.zeros(1))
        tensor([[[[2., 2.]]]])
    """

    def __init__(self, net: Any, transform: str | Transform = "hflip") -> None:
        super().__init__()
        self.net = net
        self.transform = resolve(transform)

    @property
    def classes(self) -> int:
        """The number of class labels that the network inside takes."""
        return int(getattr(self.net, "classes", 0))

    @property
    def conditional(self) -> bool:
        """Whether the network inside takes a condition."""
        return self.classes > 0 or bool(getattr(self.net, "conditional", False))

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """What stands for "no condition" in the network inside."""
        return null_condition_of(self.net, condition)

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError if the network inside does not take these states and this condition."""
        known = getattr(self.net, "check", None)
        if known is not None:
            known(x, **condition)

    def forward(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        turned = self.transform(self.net(self.transform(x), t, **condition))
        return 0.5 * (self.net(x, t, **condition) + turned)
