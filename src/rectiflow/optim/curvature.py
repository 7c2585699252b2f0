"""Estimates of the diagonal of a Hessian, unbiased and cheap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from rectiflow.errors import positive, unknown

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

PROBES = ("rademacher", "normal")


def hutchinson(
    loss: Float[Tensor, ""],
    params: Sequence[Any],
    *,
    probe: str = "rademacher",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """`u * (H u)` for random u: on average the diagonal of the loss's Hessian H.

    A second pass backward for each sample. Fused attention has no second derivative: use the math
    kernel (`torch.nn.attention.sdpa_kernel`).

    Args:
        loss: a loss with its graph.
        params: the weights.
        probe: "rademacher" (signs: exact where H is diagonal) or "normal".
        samples: how many estimates are averaged.
        generator: the source of randomness; on the weights' device.

    Returns:
        one tensor a weight; zeros for weights that the loss does not see.

    Raises:
        ValueError: an unknown probe, or no samples.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hutchinson((torch.tensor([3.0, 5.0]) * w.square()).sum() / 2, [w])
        [tensor([3., 5.])]

    Source: arXiv 2305.14342, algorithm 1.
    """
    if probe not in PROBES:
        raise unknown("probe", probe, PROBES)
    positive("samples", samples)
    grads = torch.autograd.grad(loss, list(params), create_graph=True, materialize_grads=True)
    curved = [place for place, grad in enumerate(grads) if grad.requires_grad]
    found = [torch.zeros_like(p) for p in params]
    for count in range(samples):
        probes = [_draw(grads[place], probe, generator) for place in curved]
        if not curved:
            break
        products = torch.autograd.grad(
            [grads[place] for place in curved],
            [params[place] for place in curved],
            probes,
            retain_graph=count + 1 < samples,
            materialize_grads=True,
        )
        for place, u, product in zip(curved, probes, products):
            found[place] += u * product.detach() / samples
    return found


def _draw(like: Tensor, probe: str, generator: torch.Generator | None) -> Tensor:
    normal = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return normal.sign() if probe == "rademacher" else normal


def sampled_cross_entropy(
    logits: Float[Tensor, "*rows classes"], *, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, ""], int]:
    """The loss on labels drawn from the model itself, for Gauss-Newton-Bartlett estimates.

    The squared gradient of this mean, times the number of labels, is on average the diagonal of
    the Gauss-Newton matrix. Labels of the data would give another one, see `empirical_fisher`.

    Args:
        logits: the model's answers; every row is a draw.
        generator: the source of randomness; on the logits' device.

    Returns:
        the loss, and how many labels were drawn.

    Source: arXiv 2305.14342, algorithm 2.
    """
    rows = logits.flatten(0, -2)
    labels: Int[Tensor, " rows"] = torch.multinomial(
        rows.detach().float().softmax(-1), 1, generator=generator
    ).squeeze(1)
    return functional.cross_entropy(rows, labels), len(rows)


def empirical_fisher(
    logits: Float[Tensor, "*rows classes"], labels: Int[Tensor, "*rows"]
) -> tuple[Float[Tensor, ""], int]:
    """The loss on the data's own labels, for the diagonal of the empirical Fisher matrix.

    The squared gradient of this mean, times the number of labels, is not curvature: it depends on
    how well the model fits. It needs no draw, and some ports of Sophia use it; the paper does not.

    Args:
        logits: the model's answers.
        labels: those of the data, one a row.

    Returns:
        the loss, and how many labels there are.
    """
    rows = logits.flatten(0, -2)
    return functional.cross_entropy(rows, labels.flatten()), len(rows)


def sampled_squared_error(
    output: Float[Tensor, "b *dims"],
    *,
    noise: Float[Tensor, "b *dims"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ""], int]:
    """The same for squared errors: targets drawn around the model's own outputs.

    For a loss that is the mean over samples and elements of squared differences, as in flow
    matching. Such a mean is `2 / n` times a unit-variance Gaussian's negative log-likelihood, n
    elements a sample, so residuals are drawn with a variance of n / 2: the squared gradient of
    what is returned, times the number of samples, is on average the Gauss-Newton diagonal of the
    mean squared error.

    Args:
        output: the model's outputs, one row a sample.
        noise: standard normal numbers, drawn here by default.
        generator: the source of randomness; on the outputs' device.

    Returns:
        the loss, and how many samples were drawn.

    Source: arXiv 2305.14342, section 2.3, for a Gaussian in place of a softmax.
    """
    if noise is None:
        noise = torch.randn(
            output.shape, generator=generator, device=output.device, dtype=output.dtype
        )
    target = output.detach() + noise * (output[0].numel() / 2) ** 0.5
    error = (output - target).square()
    return error.mean(), len(output)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Give a model's buffers (running statistics) back after the block as they were before."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
