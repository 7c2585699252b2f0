"""What methods that train on a reward share: adapters, chains to start, and their curve."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.align.adapters import gaussian_lora
from rectiflow.align.rewards.checked import Checked
from rectiflow.distill.lora import AdaptedNet
from rectiflow.flows.couplings import Data, Draw
from rectiflow.flows.fields import FlowModel, device_of
from rectiflow.flows.integration import time_grid
from rectiflow.training.method import Phase
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from jaxtyping import Float

Guide = Callable[[FlowModel], Any]


class RewardMethod(ABC):
    """A training method whose loss is made of a reward on the model's own samples."""

    name: str
    differentiable: bool

    def __init__(
        self,
        model: FlowModel,
        reward: Any,
        *,
        steps: int | Sequence[float] | None = None,
        rank: int = 4,
        targets: Sequence[str] | None = None,
        conditions: Data | None = None,
        guided: Guide | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if model.shape is None:
            raise ValueError("the model does not know its sample shape: set shape=")
        self.grid = time_grid(steps if steps is not None else model.sampling["steps"])
        self.reference = model
        self.model = _trained(model, rank, targets, seed)
        self.reward = Checked(reward, differentiable=self.differentiable)
        self.conditions, self.decode = conditions, decode
        self.field: Any = guided(self.model) if guided is not None else self.model
        self._seen: dict[str, Tensor | float] = {}
        self._count = 0

    @property
    def steps(self) -> int:
        """Steps of a chain."""
        return len(self.grid) - 1

    def phases(self) -> list[Phase]:
        """The one phase."""
        return [Phase(self.name, self.model, self.loss)]

    @abstractmethod
    def loss(self, draw: Draw) -> Tensor:
        """The loss of the draw's rows."""

    def take(self) -> dict[str, float]:
        """Means of what was seen (reward, steps with gradient, ...) since this was last called."""
        means = {name: float(total) / self._count for name, total in self._seen.items()}
        self._seen, self._count = {}, 0
        return means

    def start(self, draw: Draw) -> tuple[Tensor, dict[str, Any], torch.Generator]:
        """Where the chains of a draw begin, their condition, and randomness of their own."""
        condition: dict[str, Any] = {}
        if self.conditions is not None:
            found = self.conditions.condition(draw.indices(len(self.conditions)))
            condition = {name: value.to(draw.device) for name, value in found.items()}
        assert self.model.shape is not None
        x = self.model.path.start(draw.normal(self.model.shape))
        # The draw's generator is the same for all micro-batches of a step; chains need their own.
        seeds = torch.randint(2**62, (draw.size,), generator=draw.generator, device=draw.device)
        own = torch.Generator(draw.device).manual_seed(int(seeds[draw.part.start]))
        return x, condition, own

    def _note(self, reward: Float[Tensor, " b"], **more: Tensor | float) -> None:
        for name, value in {"reward": wide(reward.detach()).mean(), **more}.items():
            self._seen[name] = self._seen.get(name, 0.0) + value
        self._count += 1


def _trained(model: FlowModel, rank: int, targets: Sequence[str] | None, seed: int) -> FlowModel:
    """The copy that is trained: with adapters, or as a whole for rank 0."""
    if rank < 0:
        raise ValueError(f"rank must be >= 0 (0 trains all weights), got {rank}")
    if isinstance(model.net, AdaptedNet) or not rank:
        twin = copy.deepcopy(model)
        for name, weight in twin.named_parameters():
            weight.requires_grad_(not isinstance(model.net, AdaptedNet) or "lora_" in name)
        return twin
    return gaussian_lora(model, rank, targets, seed=seed)


def follow(reference: FlowModel, device: torch.device) -> FlowModel:
    """The reference on a device; it is moved once."""
    return reference if device_of(reference) == device else reference.to(device)
