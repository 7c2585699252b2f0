"""AlignProp on diffusers pipelines: adapters on attention, prompts, gradient through the VAE."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.align.tiny import gradients
from tests.interop.pipelines import PROMPTS, sd, sd3, tokens

from rectiflow.align import AlignProp, Fixed, LastK
from rectiflow.align.rewards import Brightness
from rectiflow.flows import ClassifierFreeGuidance
from rectiflow.flows.couplings import Draw
from rectiflow.interop.diffusers import (
    decode_latents,
    encode_prompts,
    from_pipeline,
    with_prompts,
)
from rectiflow.training import OptimizerSettings, Trainer, TrainerSettings


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_pipeline_is_aligned_through_its_vae(name: str) -> None:
    pipe = {"sd": sd, "sd3": sd3}[name]()
    pipe.vae.requires_grad_(False)
    table = encode_prompts(pipe, PROMPTS, tokens=tokens(name), cache=None)
    model = with_prompts(from_pipeline(pipe, steps=3, tokens=tokens(name)), table)
    before = {n: p.clone() for n, p in model.named_parameters()}

    def method(checkpoint: bool, truncation) -> AlignProp:
        return AlignProp(
            model, Brightness(), conditions=table, decode=partial(decode_latents, pipe), rank=2,
            guided=lambda m: ClassifierFreeGuidance(m, 3.0), checkpoint=checkpoint,
            truncation=truncation, steps=3, solver="euler",
        )  # fmt: skip

    found = []
    for checkpoint in (True, False):
        one = method(checkpoint, Fixed(1))
        loss = one.loss(Draw.of(2))
        loss.backward()
        found.append({n: g for n, g in gradients(one.model).items() if "lora_" in n})
    assert found[0]
    assert all("to_" in n for n in found[0])
    assert any(bool(g.any()) for g in found[0].values())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key])
    one = method(True, LastK(2))
    optim = OptimizerSettings(name="adamw", learning_rate=1e-2)
    settings = TrainerSettings(steps=2, batch_size=2, ema=0.0, optim=optim)
    start = {n: p.clone() for n, p in one.model.named_parameters()}
    trained = Trainer(one, settings).fit()
    moved = {n for n, p in trained.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert all("lora_" in n for n in moved)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
