"""Networks without zeros."""

from __future__ import annotations

from typing import TypeVar

import torch

Module = TypeVar("Module", bound=torch.nn.Module)


def stirred(module: Module, scale: float = 0.1, seed: int = 5) -> Module:
    """The module, noise added to every parameter, so that no zero layer hides the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()
