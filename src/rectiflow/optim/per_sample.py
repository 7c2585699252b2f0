"""Gradients of single samples, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from rectiflow.errors import positive
from rectiflow.optim.gradient_statistics import GradientStatistics, inner_squares, several
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of per-sample gradients at a time: 16 MiB in float32, which caches still hold in part.
CHUNK = 1 << 22


def per_sample_statistics(
    module: nn.Module,
    loss: Callable[..., Tensor],
    batch: Sequence[Tensor],
    *,
    inner: bool = False,
    coordinates: bool = False,
    offset: Sequence[Tensor] | None = None,
    chunk: int | None = None,
    randomness: str = "different",
) -> GradientStatistics:
    """Statistics of the gradients of single samples, over all processes.

    `torch.func.vmap` takes them some at a time. Inner products with the mean need the mean first:
    where the batch does not fit into one chunk, or has parts on other processes, gradients are
    computed twice. Some hundred samples are enough for a test.

    Args:
        module: what is trained; weights that need no gradient are left out. Layers that mix the
            samples of a batch have no gradient of one sample: evaluate batch norm by its running
            statistics, or replace it.
        loss: `loss(module, *rows)` of a batch of one, a number. What is random in a sample (times
            and noises of a flow) is best drawn before, as rows.
        batch: tensors with one row a sample.
        inner: look at the inner products with the mean, too.
        coordinates: keep squares by coordinate, at one more copy of the weights.
        offset: the gradient of what is added to every sample's loss (weight decay); it counts in
            the mean and has no variance.
        chunk: samples at a time; as many as keep in 16 MiB by default.
        randomness: see `torch.func.vmap`; dropout adds to the variance.

    Returns:
        the statistics.

    Raises:
        ValueError: an empty batch, rows that differ in number, batch norm in training mode with
            running statistics, or nothing to train.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> found = per_sample_statistics(net, lambda net, x: net(x).sum(), [x])
        >>> found.signal, round(found.noise, 4)
        (4.0, 2.0)

    Source: arXiv 2402.11215, section 3; sums are centred (Chan) and pooled exactly.
    """
    count = _checked(module, batch)
    gradients, params = _gradients_of_samples(module, loss, len(batch), randomness)
    size = sum(p.numel() for p in params)
    if chunk is None:
        chunk = max(1, CHUNK // size)
    positive("chunk", chunk)
    pieces = [slice(start, start + chunk) for start in range(0, count, chunk)]

    def parts() -> Iterator[list[Tensor]]:
        for piece in pieces:
            taken = gradients(params, *(rows[piece] for rows in batch))
            # What is the same for all samples comes as one row, expanded: not to be written to.
            yield [wide(g.clone() if 0 in g.stride() else g) for g in taken]

    found: GradientStatistics | None = None
    for part in parts():
        own = _centred(part, coordinates)
        found = own if found is None else found.merged(own)
        centred = part
    assert found is not None
    found = found.pooled()
    mean = found.mean
    if offset is not None:
        found = replace(found, mean=tuple(m + wide(o) for m, o in zip(mean, offset)))
    if not inner:
        return found
    again = len(pieces) > 1 or several()
    products = []
    for part in parts() if again else [centred]:
        if again:
            for g, m in zip(part, mean):
                g.sub_(m)
        products.append(
            torch.stack([g.reshape(len(g), -1) @ m.flatten() for g, m in zip(part, found.mean)])
        )
    return replace(found, inner=inner_squares(torch.cat(products, 1)))


def _checked(module: nn.Module, batch: Sequence[Tensor]) -> int:
    """The number of samples."""
    sizes = [len(rows) for rows in batch]
    if not sizes or sizes[0] == 0 or len(set(sizes)) > 1:
        raise ValueError(f"the batch needs tensors of one number of rows, got {sizes}")
    for name, layer in module.named_modules():
        mixes = isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
        if mixes and layer.track_running_stats:
            raise ValueError(
                f"{name or 'the module'!r} is batch norm in training mode, under which a sample "
                "has no gradient of its own: evaluate it (.eval()), or use "
                "torch.func.replace_all_batch_norm_modules_"
            )
    return sizes[0]


class _Loss(nn.Module):
    """A loss of a module as a module, so that all of its weights can be exchanged."""

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, *rows: Tensor) -> Tensor:
        return self.loss(self.module, *rows)


def _gradients_of_samples(
    module: nn.Module, loss: Callable[..., Tensor], rows: int, randomness: str
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A function from weights and a batch to gradients with one row a sample, and the weights."""
    trained = {f"module.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter requires a gradient")
    judged = _Loss(module, loss)

    def of_one(params: tuple[Tensor, ...], *row: Tensor) -> Tensor:
        given = tuple(value[None] for value in row)
        return torch.func.functional_call(judged, dict(zip(trained, params)), given)

    mapped = torch.func.vmap(torch.func.grad(of_one), (None, *(0,) * rows), randomness=randomness)
    return mapped, tuple(p.detach() for p in trained.values())


def _centred(gradients: Sequence[Tensor], coordinates: bool) -> GradientStatistics:
    """Statistics of gradients with one row a sample, whose mean is taken off in place."""
    mean, squares = [], []
    for g in gradients:
        mean.append(g.mean(0))
        g.sub_(mean[-1])
        # The norm reads any layout, without a copy of the squares.
        squares.append(g.square().sum(0) if coordinates else torch.linalg.vector_norm(g).square())
    return GradientStatistics(len(gradients[0]), 1, tuple(mean), tuple(squares))
