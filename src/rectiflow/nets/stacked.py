"""Two networks in series as one student."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from rectiflow import errors
from rectiflow.nets import registry
from rectiflow.nets.base import Net

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

MODES = ("chain", "residual", "single")


class Stacked(Net):
    """A network whose output a second one takes as its state: `v2(v1(x, t), t)`.

    A larger student for one-step distillation, made of two copies of the straightened flow. Modes:
    "chain" feeds `h = v1(x, t)` to the second network and returns what it says; "residual" moves
    on to `x' = x + (1 - t) v1` and returns `v1 + v2(x', t)`, so a second network that starts at
    zero changes nothing; "single" has no second network.

    Args:
        shape: the shape of one sample.
        first: name of a net, or `{"name": ..., other arguments of it}`.
        second: the same for the second; like the first by default.
        classes: number of class labels of both.
        mode: chain, residual or single.

    Raises:
        ValueError: an unknown mode or net, or a second network in mode "single".

    Example:
        >>> import torch
        >>> net = Stacked(shape=(2,), first={"name": "mlp", "width": 8, "depth": 1})
        >>> net(torch.randn(3, 2), torch.zeros(3)).shape
        torch.Size([3, 2])

    Source: arXiv 2309.06380, section 4 (stacked U-Net), without the removal of blocks.
    """

    name: ClassVar[str] = "stacked"

    def __init__(
        self,
        *,
        shape: Sequence[int],
        first: str | Mapping[str, Any] = "mlp",
        second: str | Mapping[str, Any] | None = None,
        classes: int = 0,
        mode: str = "chain",
    ) -> None:
        if mode not in MODES:
            raise errors.unknown("mode", mode, MODES)
        if mode == "single" and second is not None:
            raise ValueError("mode 'single' has no second network: leave second out")
        one = _description(first)
        two = _description(second) if second is not None else one
        super().__init__(
            shape=shape, first=one, second=None if mode == "single" else two, mode=mode,
            classes=classes,
        )  # fmt: skip
        self.mode = mode
        self.first = _build(one, self.shape, classes)
        self.second = None if mode == "single" else _build(two, self.shape, classes)

    @classmethod
    def of(cls, first: nn.Module, second: nn.Module | None = None, *, mode: str = "chain") -> Any:
        """A stack of copies of two networks that exist; of the first twice without a second.

        Args:
            first: a network with a `name` and a `config`, such as that of a reflowed model.
            second: the other one, of the same shape and classes.
            mode: chain, residual or single.

        Example:
            >>> from rectiflow.nets import MLP
            >>> Stacked.of(MLP(shape=(2,), width=8, depth=1), mode="residual").mode
            'residual'
        """
        if mode not in MODES:
            raise errors.unknown("mode", mode, MODES)
        other = second if second is not None else first
        described = _described(first), _described(other)
        if first.shape != other.shape:
            raise ValueError(f"parts must be of one shape, got {first.shape} and {other.shape}")
        # Not the constructor, which would make new parts only to replace them.
        stack = cls.__new__(cls)
        Net.__init__(
            stack,
            shape=first.shape,
            classes=int(getattr(first, "classes", 0)),
            first=described[0],
            second=None if mode == "single" else described[1],
            mode=mode,
        )
        stack.mode = mode
        stack.first = copy.deepcopy(first)
        stack.second = None if mode == "single" else copy.deepcopy(other)
        return stack

    def forward(
        self, x: Float[Tensor, "batch *dims"], t: Float[Tensor, "batch"], **condition: Any
    ) -> Float[Tensor, "batch *dims"]:
        h = self.first(x, t, **condition)
        if self.second is None:
            return h
        if self.mode == "chain":
            return self.second(h, t, **condition)
        rest = (1 - t).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return h + self.second(x + rest * h, t, **condition)

    @property
    def conditional(self) -> bool:
        """Whether the networks take labels or text."""
        return self.classes > 0 or bool(getattr(self.first, "conditional", False))

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The null condition of the first network."""
        if getattr(type(self.first), "null_condition", Net.null_condition) is Net.null_condition:
            return super().null_condition(**condition)
        return self.first.null_condition(**condition)

    def check(self, x: Float[Tensor, "batch *dims"], **condition: Any) -> None:
        """Raise ValueError unless the networks can be called with `x` and this condition."""
        if getattr(type(self.first), "check", Net.check) is Net.check:
            super().check(x, **condition)
        else:
            self.first.check(x, **condition)


def _description(net: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": net} if isinstance(net, str) else dict(net)


def _described(net: nn.Module) -> dict[str, Any]:
    """A network's name and arguments, without those that both parts share."""
    config, name = getattr(net, "config", None), getattr(net, "name", None)
    if not isinstance(config, dict) or name is None or not hasattr(net, "shape"):
        raise ValueError(
            f"a {type(net).__name__} cannot be stacked: it needs a name and a config with its own "
            "shape, as the networks of rectiflow.nets have; take a student of another kind"
        )
    return {"name": name, **{k: v for k, v in config.items() if k not in ("shape", "classes")}}


def _build(description: Mapping[str, Any], shape: Sequence[int], classes: int) -> nn.Module:
    options = {key: value for key, value in description.items() if key != "name"}
    return registry.build(description["name"], shape=shape, classes=classes, **options)
