"""What the built-in networks share: a rebuildable config and checks at the border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rectiflow import errors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Net(nn.Module):
    """A network that remembers how it was built and can check what it is given.

    Nothing in rectiflow requires this class: solvers and methods accept any module with
    `forward(x, t, **condition)`. Deriving from it gives a network the config that
    `nets.build` reads back, the null condition that guidance needs, and `check`.

    Args:
        shape: the shape of one sample, without the batch.
        classes: the number of class labels; 0 makes an unconditional net.
        config: the remaining constructor arguments, plain values.

    Example:
        >>> from rectiflow.nets import MLP, build
        >>> net = MLP(shape=(2,), width=16, depth=1)
        >>> build(net.name, **net.config).config == net.config
        True
    """

    name: ClassVar[str]

    def __init__(self, *, shape: Sequence[int], classes: int = 0, **config: Any) -> None:
        super().__init__()
        self.shape = tuple(int(side) for side in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must list sizes >= 1, got {self.shape}")
        errors.positive("classes", classes, zero=True)
        self.classes = classes
        plain = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in config.items()}
        self.config: dict[str, Any] = {"shape": list(self.shape), **plain, "classes": classes}

    def null_condition(self, **condition: Tensor | None) -> dict[str, Tensor]:
        """The condition that stands for "no condition", shaped like the one given.

        Args:
            condition: what the net would be called with, for instance `label=...`.

        Returns:
            `{"label": tensor full of the null index}`, or `{}` where no label was given (a
            missing label already is the null one).

        Raises:
            ValueError: a condition this net does not take.
        """
        label = self._label(condition)
        return {} if label is None else {"label": torch.full_like(label, self.classes)}

    def check(self, x: Float[Tensor, "batch *dims"], **condition: Any) -> None:
        """Raise ValueError unless the net can be called with `x` and this condition.

        Meant for the border (samplers, commands, data), not for every forward: reading the
        range of the labels waits for the device.

        Args:
            x: samples, floating point, each of the net's `shape`.
            condition: `label`, int64 of shape (batch,), from 0 to `classes` (the null index).
        """
        if tuple(x.shape[1:]) != self.shape or x.ndim != len(self.shape) + 1:
            raise ValueError(
                f"{self.name} takes x of shape (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}: convert it, say x.float()")
        label = self._label(condition)
        if label is None:
            return
        if label.dtype != torch.int64:
            raise ValueError(f"label must be int64, got {label.dtype}: convert it by label.long()")
        if label.shape != x.shape[:1]:
            raise ValueError(
                f"label must have one entry per sample, shape ({len(x)},), got {tuple(label.shape)}"
            )
        if label.device != x.device:
            raise ValueError(f"label is on {label.device} but x on {x.device}: move one of them")
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) <= self.classes:
            raise ValueError(
                f"label must be from 0 to {self.classes - 1} ({self.classes} for none), "
                f"got {int(label.min())} to {int(label.max())}"
            )

    def _label(self, condition: dict[str, Tensor | None]) -> Tensor | None:
        extra = sorted(set(condition) - {"label"})
        if extra:
            raise ValueError(f"{self.name} takes the condition 'label' only, got {extra[0]!r}")
        label = condition.get("label")
        if label is not None and not self.classes:
            raise ValueError(
                f"label was given to an unconditional {self.name}: "
                "leave it out or build the net with classes=N"
            )
        return label


def null_condition_of(net: Any, condition: Mapping[str, Any]) -> dict[str, Any]:
    """The condition that stands for "none", as any network says it.

    Raises:
        ValueError: a network without `null_condition` that is given a condition.
    """
    known = getattr(net, "null_condition", None)
    if known is not None:
        return known(**condition)
    if condition:
        raise ValueError(
            f"{type(net).__name__} has no null condition for {', '.join(condition)}: "
            "give it a method null_condition(**condition)"
        )
    return {}
