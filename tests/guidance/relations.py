"""A small relation, and a model of two numbers that obeys it, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.flows import FlowModel
from rectiflow.guidance import (
    ConditionRectifier,
    RelationalGraphAttention,
    RelationExamples,
    RelationPrompts,
)
from rectiflow.guidance.relation_prompts import PROMPTS

WIDTH, TOKENS, CHANNELS = 6, 4, 8
ENDS = torch.tensor([2, 3, 1, 1])


class Reader(nn.Module):
    """Predicts from the state, the time and the mean of a sequence of vectors."""

    conditional = True

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.inner = nn.Linear(CHANNELS + size + 1, 16)
        self.outer = nn.Linear(16, size)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, *, context: Tensor) -> Tensor:
        self.seen.append({"x": x, "t": t, "context": context})
        rows = torch.cat([x, t[:, None], context.mean(1)], 1)
        return self.outer(torch.tanh(self.inner(rows)))

    def null_condition(self, *, context: Tensor) -> dict[str, Any]:
        return {"context": torch.zeros_like(context)}


def model(prediction: str = "velocity", seed: int = 0, **options: Any) -> FlowModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Reader()
    return FlowModel(net, prediction=prediction, shape=(2,), **options).eval()


def rectifier(seed: int = 1, width: int = WIDTH, **options: Any) -> ConditionRectifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = RelationalGraphAttention(width, hidden=5)
        for layer in (net.first, net.second):
            nn.init.normal_(layer.bias)
    return ConditionRectifier(net, **options)


def prompts(seed: int = 2) -> RelationPrompts:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(len(PROMPTS), TOKENS, CHANNELS, generator=generator)
    words = torch.randn(3, WIDTH, generator=generator)
    return RelationPrompts({"context": context}, words, ENDS)


def examples(seed: int = 3) -> RelationExamples:
    """Three to six pictures of each prompt, which say what they are."""
    generator = torch.Generator().manual_seed(seed)
    pictures = {
        name: torch.randn(3 + number, 2, generator=generator) + 10 * number
        for number, name in enumerate(PROMPTS)
    }
    return RelationExamples(prompts(), pictures)
