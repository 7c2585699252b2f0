"""Costs of an estimate of the data, one number a sample, for steering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from rectiflow.flows.integration import Step

REDUCTIONS = ("sum", "mean")


class Operator(Protocol):
    """A linear measurement; those of `images.degradations` are made for it."""

    def A(self, images: Tensor) -> Tensor:
        """The measurement of images."""

    def AT(self, measured: Tensor) -> Tensor:
        """The adjoint."""

    def norm(self, image: Any) -> float:
        """The norm for images of a shape, or an upper bound."""


class Cost(ABC):
    """What a sample should make small: `cost(data) -> (b,)`, each row of its own sample alone.

    Costs add (`a + b`), scale (`0.5 * a`) and hand out values with gradients. `curvature(shape)`
    is an upper bound of half the second derivative, such as `||A||²` of a linear measurement; a
    step of `step_size / curvature` then shrinks the cost for any `step_size` below 1.
    """

    @abstractmethod
    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        """The cost of each sample."""

    def curvature(self, shape: tuple[int, ...]) -> float | None:
        """Half the largest second derivative for samples of a shape, or None if not known."""
        return None

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        """The cost of each sample and its gradient with respect to that sample.

        Raises:
            ValueError: the cost has another shape than `(b,)`, or no gradient.
        """
        # A copy: tensors of inference mode cannot be differentiated.
        with torch.inference_mode(False), torch.enable_grad():
            free = data.detach().clone().requires_grad_()
            value = self(free)
            name = type(self).__name__
            if value.shape != data.shape[:1]:
                raise ValueError(
                    f"{name} must give one number for each of the {data.shape[0]} samples, "
                    f"got shape {tuple(value.shape)}"
                )
            if not value.requires_grad:
                raise ValueError(
                    f"{name} has no gradient with respect to the data: use differentiable "
                    "operations only"
                )
            (slope,) = torch.autograd.grad(value.sum(), free, allow_unused=True)
        return value.detach(), torch.zeros_like(data) if slope is None else slope

    def __add__(self, other: Cost) -> Cost:
        return Sum(self, other)

    def __mul__(self, factor: float) -> Cost:
        return Scaled(self, factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Sum(Cost):
    """Two costs together.

    Example:
        >>> total = Custom(lambda x: x.sum(1)) + 2 * Custom(lambda x: x.square().sum(1))
        >>> total(torch.tensor([[1.0, 2.0]]))
        tensor([13.])
    """

    first: Cost
    second: Cost

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        return self.first(data) + self.second(data)

    def curvature(self, shape: tuple[int, ...]) -> float | None:
        found = self.first.curvature(shape), self.second.curvature(shape)
        return None if found[0] is None or found[1] is None else found[0] + found[1]

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        (value, slope), (more, steeper) = self.first.gradient(data), self.second.gradient(data)
        return value + more, slope + steeper


@dataclass(frozen=True)
class Scaled(Cost):
    """A cost times a factor >= 0: its weight in a sum.

    Raises:
        ValueError: a factor that is negative or not finite.
    """

    cost: Cost
    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < float("inf"):
            raise ValueError(f"the scale of a cost must be finite and >= 0, got {self.factor}")

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        return self.factor * self.cost(data)

    def curvature(self, shape: tuple[int, ...]) -> float | None:
        found = self.cost.curvature(shape)
        return None if found is None else self.factor * found

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        value, slope = self.cost.gradient(data)
        return self.factor * value, self.factor * slope


@dataclass(frozen=True, eq=False)
class LinearInverse(Cost):
    """How far the data are from a measurement: `|A x - y|²`, its gradient `2 AT (A x - y)` exact.

    For filling in, sharpening, enlarging and colouring: any operator with `A`, `AT` and `norm`.

    Args:
        operator: the linear measurement.
        measured: y, one row for each sample or a single one for all. It holds its noise already.
        reduction: `sum` over the measurement, or its `mean`, as most published code has it.

    Raises:
        ValueError: measurements that are not finite or have another shape than `A` makes.

    Example:
        >>> from rectiflow.images.degradations import Downscale
        >>> cost = LinearInverse(Downscale(2), torch.zeros(1, 1, 1, 1))
        >>> cost.gradient(torch.ones(1, 1, 2, 2))[1].flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    operator: Operator
    measured: Tensor
    reduction: str = "sum"

    def __post_init__(self) -> None:
        _reduction(self.reduction)
        _finite("the measurement", self.measured)

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        return self._weight() * self._residual(data).square().flatten(1).sum(1)

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        residual, weight = self._residual(data), self._weight()
        slope = (2 * weight) * self.operator.AT(residual)
        return weight * residual.square().flatten(1).sum(1), slope

    def curvature(self, shape: tuple[int, ...]) -> float | None:
        return self._weight() * self.operator.norm(shape) ** 2

    def _weight(self) -> float:
        return 1.0 if self.reduction == "sum" else 1 / self.measured[0].numel()

    def _residual(self, data: Tensor) -> Tensor:
        seen = self.operator.A(data)
        wanted = self.measured.to(seen)
        _rows("measurements", wanted, seen)
        return seen - wanted


@dataclass(frozen=True, eq=False)
class Masked(Cost):
    """How far the data are from a reference where it is kept: `sum keep (x - reference)²`.

    For latents, where nothing needs to be decoded, and for editing. The gradient is exactly zero
    in the hole.

    Args:
        reference: what to keep, one row for each sample or a single one for all.
        keep: weights in [0, 1] that broadcast with a sample; 1 everywhere is allowed.
        reduction: `sum`, or the `mean` over all numbers of a sample, kept or not.

    Raises:
        ValueError: weights outside [0, 1], references that are not finite or of another shape.

    Example:
        >>> cost = Masked(torch.zeros(1, 2), torch.tensor([1.0, 0.0]))
        >>> cost.gradient(torch.ones(1, 2))[1]
        tensor([[2., 0.]])
    """

    reference: Tensor
    keep: Tensor
    reduction: str = "sum"

    def __post_init__(self) -> None:
        _reduction(self.reduction)
        _finite("the reference", self.reference)
        low, high = float(self.keep.min()), float(self.keep.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"keep must have values in [0, 1], got {low:g} to {high:g}")
        try:
            fits = torch.broadcast_shapes(self.keep.shape, self.reference.shape)
        except RuntimeError:
            fits = None
        if fits != self.reference.shape:
            raise ValueError(
                f"the mask has shape {tuple(self.keep.shape)}, which does not fit references of "
                f"shape {tuple(self.reference.shape)}: bring it to their size"
            )

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        return self.gradient(data)[0]

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        reference, keep = self.reference.to(data), self.keep.to(data)
        _rows("references", reference, data)
        weight = 1.0 if self.reduction == "sum" else 1 / data[0].numel()
        away = data - reference
        pull = keep * away
        return weight * (pull * away).flatten(1).sum(1), (2 * weight) * pull

    def curvature(self, shape: tuple[int, ...]) -> float | None:
        weight = 1.0 if self.reduction == "sum" else 1 / self.reference[0].numel()
        return weight * float(self.keep.max())


@dataclass(frozen=True, eq=False)
class Classifier(Cost):
    """Minus the log-probability of a class, its gradient brought to unit RMS in each sample.

    Classifiers differ in the size of their gradients by orders of magnitude; normalised, a step
    size means the same for all of them (our choice, see the source).

    Args:
        classifier: data to logits `(b, classes)`, differentiable.
        label: the class of each sample, or one for all.
        normalised: bring the gradient to unit RMS; False leaves it as it is.

    Raises:
        ValueError: a label that the classifier does not know, or logits of another shape.

    Example:
        >>> cost = Classifier(lambda x: x, 0)
        >>> cost(torch.zeros(2, 4)).exp()
        tensor([4., 4.])

    Source: arXiv 2412.00100, classifier guidance; the normalisation is ours.
    """

    classifier: Callable[[Tensor], Tensor]
    label: Int[Tensor, " b"] | int
    normalised: bool = True

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        logits = self.classifier(data)
        if logits.ndim != 2 or logits.shape[0] != data.shape[0]:
            raise ValueError(
                f"the classifier must give logits of shape ({data.shape[0]}, classes), "
                f"got {tuple(logits.shape)}"
            )
        label = torch.as_tensor(self.label, device=logits.device).expand(data.shape[0])
        if not (int(label.min()) >= 0 and int(label.max()) < logits.shape[1]):
            raise ValueError(
                f"labels must be in 0 to {logits.shape[1] - 1}, got {int(label.min())} to "
                f"{int(label.max())}"
            )
        return functional.cross_entropy(logits, label, reduction="none")

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        value, slope = super().gradient(data)
        if self.normalised:
            size = slope.flatten(1).square().mean(1).sqrt()
            # A class that is certain leaves no direction; its gradient stays zero.
            slope = slope / size.clamp(min=1e-12).reshape(-1, *(1,) * (slope.ndim - 1))
        return value, slope


@dataclass(frozen=True, eq=False)
class Custom(Cost):
    """Any differentiable function of the data with one number a sample.

    Args:
        function: data `(b, ...)` to costs `(b,)`; each must depend on its own sample alone.

    Example:
        >>> Custom(lambda x: x.square().sum(1)).gradient(torch.ones(1, 2))[1]
        tensor([[2., 2.]])
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        value: Any = self.function(data)
        if not isinstance(value, Tensor) or value.shape != data.shape[:1]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"a cost must give one number for each of the {data.shape[0]} samples, got {shape}"
            )
        return value


@dataclass(frozen=True, eq=False)
class Decoded(Cost):
    """A cost of pictures for a model of latents: `cost(decode(latents))`.

    The cost's own gradient (that of `Classifier` has unit RMS) goes back through the decoder, not
    through the flow's network.

    Args:
        cost: a cost of what `decode` makes.
        decode: latents to pictures, such as `partial(decode_latents, pipe)`.

    Raises:
        ValueError: a decoder without a gradient.

    Example:
        >>> cost = Decoded(Custom(lambda x: x.sum(1)), lambda z: 3 * z)
        >>> cost.gradient(torch.ones(1, 2))[1]
        tensor([[3., 3.]])
    """

    cost: Cost
    decode: Callable[[Tensor], Tensor]

    def __call__(self, data: Float[Tensor, "b *dims"]) -> Float[Tensor, " b"]:
        return self.cost(self.decode(data))

    def gradient(
        self, data: Float[Tensor, "b *dims"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b *dims"]]:
        with torch.inference_mode(False), torch.enable_grad():
            free = data.detach().clone().requires_grad_()
            decoded = self.decode(free)
            if not decoded.requires_grad:
                raise ValueError(
                    "the decoder has no gradient with respect to the latents: use differentiable "
                    "operations only"
                )
            value, slope = self.cost.gradient(decoded.detach())
            (found,) = torch.autograd.grad(decoded, free, slope)
        return value, found


class StateCost(ABC):
    """What a state should make small, which is seen only by asking the network about it.

    In place of an estimate of the data it is given the state after a step, and its gradient runs
    back through the network.
    """

    @abstractmethod
    def at(self, step: Step) -> Cost:
        """The cost of states at the time after a step."""


def as_cost(cost: Cost | StateCost | Callable[[Tensor], Tensor]) -> Cost | StateCost:
    """The cost itself, or a function made one."""
    return cost if isinstance(cost, Cost | StateCost) else Custom(cost)


def _reduction(given: str) -> None:
    if given not in REDUCTIONS:
        from rectiflow.errors import unknown

        raise unknown("reduction", given, REDUCTIONS)


def _finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _rows(name: str, given: Tensor, like: Tensor) -> None:
    if given.shape[1:] != like.shape[1:] or given.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)} (or one row), got {tuple(given.shape)}"
        )
