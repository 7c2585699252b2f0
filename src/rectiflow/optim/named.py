"""Optimizers by the names of their papers, with the papers' defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rectiflow.errors import unknown
from rectiflow.optim.adagrad_norm import AdagradNorm
from rectiflow.optim.chained import ChainedOptimizer, Params
from rectiflow.optim.coordinate_clipping import ClipCoordinates
from rectiflow.optim.directions import Adagrad, Adam, Lion, Momentum
from rectiflow.optim.friction import Friction
from rectiflow.optim.parts import Direction, Part
from rectiflow.optim.radial_projection import RadialProjection
from rectiflow.optim.split_sign import SplitSign
from rectiflow.optim.whole_directions import Sign, UnitTensors

if TYPE_CHECKING:
    from torch import Tensor


class DiffGrad(ChainedOptimizer):
    """Adam whose step is weighted by how much each weight's gradient has just changed.

    Args:
        params: weights or groups.
        lr: learning rate.
        betas: decays of Adam's means.
        eps: see `Adam`.
        weight_decay: weight decay, added to the gradient unless `decoupled`.
        decoupled: decay the weights instead (AdamW).
        version: form of the friction, v0 to v5, see `Friction.preset`.
        friction: a friction of your own in its place.
        eps_mode: "uncorrected" (the released code and its ports) or "corrected" (the paper).
        amsgrad: see `Adam`.
        rectify: see `Adam`; with it this is "diffRGrad".
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Source: arXiv 1909.11015, algorithm 1. The released first file compares each gradient with
        itself wherever gradients are zeroed in place; this one does not.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        version: str = "v0",
        friction: Friction | None = None,
        eps_mode: str = "uncorrected",
        amsgrad: bool = False,
        rectify: bool = False,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        own = friction if friction is not None else Friction.preset(version)
        rule = Adam(betas, eps, amsgrad, eps_mode=eps_mode, rectify=rectify)
        super().__init__(
            params,
            [rule, own],
            lr=lr,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            compile=compile,
        )


class AdamP(ChainedOptimizer):
    """Adam without the part of a step that only makes scale-invariant weights longer.

    Args:
        params: weights or groups; groups may set `projection` and `channel_dim`.
        lr: learning rate.
        betas: decays of Adam's means.
        eps: see `Adam`.
        weight_decay: decoupled weight decay.
        delta: see `RadialProjection`.
        wd_ratio: see `RadialProjection`.
        nesterov: see `Adam`.
        maximize: go up.

    Source: arXiv 2006.08217, algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            [Adam(betas, eps, nesterov=nesterov), RadialProjection(delta, wd_ratio, eps)],
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
        )


class SGDP(ChainedOptimizer):
    """Momentum without the part of a step that only makes scale-invariant weights longer.

    Weight decay is decoupled and divided by `1 - momentum`, so that its numbers mean what they
    mean for `torch.optim.SGD`.

    Args:
        params: weights or groups; groups may set `projection` and `channel_dim`.
        lr: learning rate.
        momentum: see `Momentum`.
        dampening: see `Momentum`.
        weight_decay: weight decay.
        nesterov: see `Momentum`.
        eps: added to norms.
        delta: see `RadialProjection`.
        wd_ratio: see `RadialProjection`.
        project_buffer: see `RadialProjection`; with nesterov, or without momentum, there is
            nothing to project.
        maximize: go up.

    Source: arXiv 2006.08217, algorithm 1.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_buffer: bool = False,
        maximize: bool = False,
    ) -> None:
        shared = project_buffer and momentum > 0 and not nesterov
        projection = RadialProjection(delta, wd_ratio, eps, shared)
        super().__init__(
            params,
            [Momentum(momentum, dampening, nesterov), projection],
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
        )

    def _numbers(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        numbers = super()._numbers(group, step)
        numbers["decay"] /= 1 - group["momentum"]
        return numbers


class AdAdaGrad(ChainedOptimizer):
    """AdaGrad; with a batch that grows by `NormTest` it is AdAdaGrad.

    Args:
        params: weights or groups.
        lr: learning rate.
        eps: added to the root.
        initial: what the sums begin with.
        weight_decay: weight decay, added to the gradient.
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Source: arXiv 2402.11215, section 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        eps: float = 1e-10,
        initial: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            [Adagrad(eps, initial)],
            lr=lr,
            weight_decay=weight_decay,
            decoupled=False,
            maximize=maximize,
            compile=compile,
        )


class AdAdaGradNorm(ChainedOptimizer):
    """AdaGrad with one step size for all weights of a group, for growing batches.

    Args:
        params: weights or groups.
        lr: learning rate.
        initial: the squared norm that the sum begins with.
        eps: added to the root.
        weight_decay: weight decay, added to the gradient.
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Source: arXiv 2402.11215, section 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        initial: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            [AdagradNorm(initial, eps)],
            lr=lr,
            weight_decay=weight_decay,
            decoupled=False,
            maximize=maximize,
            compile=compile,
        )


# Bases of clipped optimizers: the rule, and the fraction that the paper clips.
BASES: dict[str, tuple[tuple[Any, ...], float]] = {
    "sgd": ((Momentum,), 0.1),
    "normalized-sgd": ((Momentum, UnitTensors), 0.1),
    "sign-sgd": ((Momentum, Sign), 0.1),
    "adam": ((Adam,), 0.5),
    "lion": ((Lion,), 0.5),
}


class CoordinateClipped(ChainedOptimizer):
    """An optimizer whose gradient is clipped in its few largest coordinates.

    Args:
        params: weights or groups.
        base: "sgd", "normalized-sgd" (each tensor's step has a root mean square of the learning
            rate), "sign-sgd", "adam" or "lion", or a direction rule such as `Momentum(0.9, 0.9)`.
        lr: learning rate; clipped SGD takes 5 to 10 times that of SGD.
        fraction: share of the coordinates to clip; the paper's for the base by default.
        scope: see `ClipCoordinates`.
        where: see `ClipCoordinates`; "momentum" (Adam's second moments see the whole gradient) by
            default for adam, "gradient" for the others.
        threshold_scale: see `ClipCoordinates`.
        smoothing: see `ClipCoordinates`.
        refresh: see `ClipCoordinates`.
        weight_decay: decoupled weight decay.
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Raises:
        ValueError: an unknown base.

    Source: arXiv 2306.00204, algorithms 1 to 4. As released, the official optimizers do not clip
        at all unless foreach=True is passed; this follows their foreach path.
    """

    def __init__(
        self,
        params: Params,
        base: str | Direction = "sgd",
        lr: float | Tensor = 1e-2,
        *,
        fraction: float | None = None,
        scope: str = "global",
        where: str | None = None,
        threshold_scale: float = 1.0,
        smoothing: float = 0.0,
        refresh: int = 1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        parts, usual = ((base,), 0.1) if isinstance(base, Direction) else _base(base)
        adaptive = isinstance(parts[0], Adam)
        clip = ClipCoordinates(
            usual if fraction is None else fraction,
            scope,
            where or ("momentum" if adaptive else "gradient"),
            threshold_scale,
            smoothing,
            refresh,
        )
        super().__init__(
            params,
            [clip, *parts],
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
            compile=compile,
        )


def _base(name: str) -> tuple[tuple[Part, ...], float]:
    """The parts of a name, the rule first, and the fraction that is clipped for it."""
    if name not in BASES:
        raise unknown("base optimizer", name, BASES)
    kinds, fraction = BASES[name]
    return tuple(kind() for kind in kinds), fraction


class SplitSGD(ChainedOptimizer):
    """Momentum, with sign steps for the few weights whose gradients are largest.

    Args:
        params: weights or groups.
        lr: learning rate.
        fraction: see `SplitSign`.
        ratio: see `SplitSign`.
        momentum: see `SplitSign`.
        dampening: see `SplitSign`.
        weight_decay: decoupled weight decay.
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Source: arXiv 2311.04163, section on optimizers; details are ours. Not the SplitSGD of Sordello
        and others (2019), nor the split bfloat16 one.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        *,
        fraction: float = 0.05,
        ratio: float = 1e-2,
        momentum: float = 0.9,
        dampening: float = 0.9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            [SplitSign(fraction, ratio, momentum, dampening)],
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
            compile=compile,
        )
