"""Small models whose Hessians can be written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rectiflow.diagnose import SampleProbe


def net(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """Layers in float64 with weights drawn from the seed."""
    made = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return made


def classifier(seed: int = 0) -> nn.Sequential:
    """3 numbers in, 3 classes out, 35 weights."""
    return net(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), seed=seed)


def data(count: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def probe(count: int = 12, seed: int = 0) -> SampleProbe:
    return SampleProbe(classifier(seed), *data(count))


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: functional.cross_entropy(model(batch[0]), batch[1])


def dense(model: nn.Module, loss: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """The Hessian of a loss of a model, all of it, row by row."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])

    def at(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        weights = {name: part.view(p.shape) for part, (name, p) in zip(parts, named.items())}
        return loss(lambda x: functional_call(model, weights, (x,)))

    return torch.autograd.functional.hessian(at, flat)


def randoms(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
