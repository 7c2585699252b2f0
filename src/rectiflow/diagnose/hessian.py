"""The Hessian of a loss with respect to weights, as a map on vectors: it is never written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow.diagnose.looking import untouched

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Hessian:
    """The matrix of second derivatives of a mean loss at the present weights.

    `hessian @ v` is exact, by differentiating the inner product of the gradient and v. Vectors are
    flat: all weights one after the other, in the order given. With one batch the graph of the
    gradient is kept, so that a product costs one pass backward; with several it is made anew each
    time, and memory is that of one batch. Weights must not change while it is in use. `p.grad`, the
    model's mode and its running statistics are left as they are.

    Args:
        loss: from a batch to the mean loss over it.
        params: the weights, float32 or float64 on one device.
        batches: what the loss is averaged over; each counts the same.
        module: the model, which is looked at in evaluation mode.
        batch_statistics: see `rectiflow.diagnose.looking.untouched`.

    Raises:
        ValueError: no weights or batches, frozen or half-precision weights, several devices.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> h = Hessian(lambda scale: (scale * w.square()).sum() / 2, [w], [torch.tensor([3., 5.])])
        >>> h @ torch.ones(2), h.gradient()
        (tensor([3., 5.]), tensor([ 3., 10.]))

    Source: Pearlmutter 1994.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        params: Iterable[Any],
        batches: Sequence[Any],
        *,
        module: nn.Module | None = None,
        batch_statistics: bool = False,
    ) -> None:
        self.loss, self.params, self.batches = loss, list(params), list(batches)
        self.module, self.batch_statistics = module, batch_statistics
        _check(self.params)
        if not self.batches:
            raise ValueError("a loss is averaged over one batch or more, got none")
        self.sizes = [p.numel() for p in self.params]
        self.device = self.params[0].device
        wide = any(p.dtype == torch.float64 for p in self.params)
        self.dtype = torch.float64 if wide else torch.float32
        self._kept: tuple[Tensor, list[Tensor]] | None = None

    def __len__(self) -> int:
        """The number of weights."""
        return sum(self.sizes)

    def flatten(self, parts: Sequence[Tensor]) -> Float[Tensor, " n"]:
        """One tensor a weight as one vector."""
        return torch.cat([part.detach().reshape(-1).to(self.dtype) for part in parts])

    def unflatten(self, vector: Float[Tensor, " n"]) -> list[Tensor]:
        """A vector as tensors shaped like the weights."""
        parts = vector.split(self.sizes)
        return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.params)]

    def value(self) -> float:
        """The mean loss."""
        with self._looking():
            return sum(float(self._slopes(b)[0].detach()) for b in self.batches) / len(self.batches)

    def gradient(self) -> Float[Tensor, " n"]:
        """The gradient of the mean loss."""
        with self._looking():
            found = [self.flatten(self._slopes(batch)[1]) for batch in self.batches]
        return sum(found[1:], found[0]) / len(found)

    def __matmul__(self, vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        if vector.shape != (len(self),):
            raise ValueError(
                f"the Hessian of {len(self)} weights takes vectors of that length, got shape "
                f"{tuple(vector.shape)}"
            )
        parts = self.unflatten(vector)
        total = torch.zeros(len(self), dtype=self.dtype, device=self.device)
        with self._looking():
            for batch in self.batches:
                total += self._product(self._slopes(batch)[1], parts)
        return total / len(self.batches)

    def _looking(self) -> Any:
        return untouched(self.module, batch_statistics=self.batch_statistics)

    def _slopes(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient of a batch, with the gradient's graph."""
        if self._kept is not None:
            return self._kept
        loss = self.loss(batch)
        grads = torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True)
        if len(self.batches) == 1:
            self._kept = (loss, list(grads))
        return loss, list(grads)

    def _product(self, grads: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """Hessian times a vector, from a gradient with its graph."""
        curved = [place for place, grad in enumerate(grads) if grad.requires_grad]
        if not curved:
            return torch.zeros(len(self), dtype=self.dtype, device=self.device)
        found = torch.autograd.grad(
            [grads[place] for place in curved],
            self.params,
            [parts[place] for place in curved],
            retain_graph=self._kept is not None,
            materialize_grads=True,
        )
        return self.flatten(found)


def _check(params: Sequence[Any]) -> None:
    """Raise ValueError for weights whose curvature cannot be had."""
    if not params:
        raise ValueError("curvature needs one weight or more, got none")
    for p in params:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"curvature needs float32 or float64 weights, got {p.dtype}: look at a float32 "
                "copy of the model"
            )
        if not p.requires_grad:
            raise ValueError("curvature needs weights that require a gradient: leave out the rest")
        if p.device != params[0].device:
            raise ValueError(
                f"curvature needs all weights on one device, got {params[0].device} and {p.device}"
            )
