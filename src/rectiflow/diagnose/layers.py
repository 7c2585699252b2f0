"""Sharpness layer by layer: the largest eigenvalues of the Hessian's diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rectiflow.diagnose.eigenpairs import top_eigenpair
from rectiflow.diagnose.hessian import Hessian

if TYPE_CHECKING:
    from torch import Tensor


def layers_of(module: nn.Module) -> dict[str, list[Tensor]]:
    """The trained weights by the layer that holds them, in order; shared ones only once.

    Example:
        >>> {name: len(held) for name, held in layers_of(nn.Sequential(nn.Linear(2, 3))).items()}
        {'0': 2}
    """
    found: dict[str, list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            found.setdefault(name.rpartition(".")[0] or name, []).append(p)
    return found


def block_sharpness(
    loss: Callable[[Any], Tensor],
    blocks: Mapping[str, Sequence[Any]],
    batches: Sequence[Any],
    *,
    module: nn.Module | None = None,
    batch_statistics: bool = False,
    steps: int = 20,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """How sharply the loss is curved when one layer moves and the others stay.

    None of these exceeds the sharpness of all weights together. Early layers, which meet the
    largest features of the data, are usually the sharpest.

    Args:
        loss: from a batch to the mean loss over it.
        blocks: name to weights, such as `layers_of(model)`.
        batches: what the loss is averaged over.
        module: the model, which is looked at in evaluation mode.
        batch_statistics: see `Hessian`.
        steps: most Hessian-vector products a block.
        tolerance: largest residual, as a part of the eigenvalue.
        generator: the source of randomness, on the weights' device.

    Example:
        >>> a, b = (torch.tensor(w, requires_grad=True) for w in (1.0, 2.0))
        >>> found = block_sharpness(lambda _: a**2 + 3 * b**2, {"a": [a], "b": [b]}, [None])
        >>> {name: round(value, 4) for name, value in found.items()}
        {'a': 2.0, 'b': 6.0}

    Source: arXiv 2311.04163, section 3.
    """
    found = {}
    for name, params in blocks.items():
        hessian = Hessian(loss, params, batches, module=module, batch_statistics=batch_statistics)
        pair = top_eigenpair(hessian, steps=steps, tolerance=tolerance, generator=generator)
        found[name] = pair.value
    return found
