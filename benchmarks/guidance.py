"""What does guidance cost: guided or not, APG beside CFG, our loop beside a pipeline's own?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import harness
from rectiflow.flows import ClassifierFreeGuidance, FlowModel, integrate, sample
from rectiflow.guidance import APG
from rectiflow.nets import build

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 10
PLAIN, BATCHED, CALLS, PROJECTED = "unguided", "CFG in one call", "CFG in two calls", "APG"
OURS, THEIRS = "our solver", "the pipeline's scheduler"
# Name, shape, batch, network and its arguments: short vectors, small images, a transformer.
CASES: tuple[tuple[str, tuple[int, ...], int, str, dict[str, Any]], ...] = (
    ("mlp 0.5 M, batch 64", (1, 8, 8), 64, "mlp", {"width": 256, "depth": 3}),
    ("unet width 32, batch 4", (3, 16, 16), 4, "unet", {"width": 32, "blocks": 1}),
    ("mmdit width 64, batch 4", (3, 16, 16), 4, "mmdit", {"depth": 2, "heads": 4, "head_dim": 16}),
)


def network(name: str, shape: tuple[int, ...], options: dict[str, Any]) -> FlowModel:
    """A model with classes and no zero weight."""
    net = build(name, shape=shape, classes=10, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return FlowModel(net, shape=shape)


def guided(case: str, model: FlowModel, count: int, rounds: int) -> list[harness.Row]:
    """Trajectories under each guidance, on the same noises."""
    assert model.shape is not None
    x, label = torch.randn(count, *model.shape), torch.arange(count) % 10
    fields: dict[str, Any] = {
        PLAIN: model,
        BATCHED: ClassifierFreeGuidance(model, 4.0),
        CALLS: ClassifierFreeGuidance(model, 4.0, batched=False),
        PROJECTED: APG(model, 4.0, norm=2.0),
    }

    def runner(field: Any) -> Callable[[], Any]:
        return lambda: integrate(field, x, STEPS, label=label)

    with torch.inference_mode():
        one, two = (runner(fields[name])() for name in (BATCHED, CALLS))
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
        timers = {name: harness.block(runner(field)) for name, field in fields.items()}
        found = harness.measure(timers, floor=PLAIN, rounds=rounds)
    return [
        harness.ratio(case, found, CALLS, PLAIN, target=2.05),
        harness.ratio(case, found, BATCHED, PLAIN, target=2.05),
        harness.ratio(case, found, BATCHED, CALLS),
        harness.ratio(case, found, PROJECTED, BATCHED, target=1.03),
    ]


def pipelines(name: str, rounds: int) -> list[harness.Row]:
    """A tiny pipeline under guidance: its own loop, and ours around the same network."""
    from tests.interop.pipelines import PROMPTS, SIZE, noises, shared, tokens

    from rectiflow.interop.diffusers import encode_prompts, from_pipeline, stock_times

    pipe = shared(name)
    made = encode_prompts(pipe, PROMPTS, tokens=tokens(name), cache=None).everything()
    model = from_pipeline(
        pipe, size=SIZE, tokens=tokens(name), init="analytic" if name == "sd" else "native"
    )
    null, x, times = model.null_condition(**made), noises(), stock_times(pipe, STEPS)
    field = ClassifierFreeGuidance(model, 3.0)
    given: dict[str, Any] = {
        "prompt_embeds": made["context"],
        "negative_prompt_embeds": null["context"],
    }
    if "pooled" in made:
        given["pooled_prompt_embeds"] = made["pooled"]
        given["negative_pooled_prompt_embeds"] = null["pooled"]

    def theirs() -> Any:
        return pipe(
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            latents=x,
            output_type="latent",
            **given,
        ).images

    def ours() -> Any:
        return sample(model, source=x, steps=times, solver="euler", field=field, **made)

    with torch.inference_mode():
        timers = {THEIRS: harness.block(theirs), OURS: harness.block(ours)}
        found = harness.measure(timers, floor=THEIRS, rounds=rounds)
    return [harness.ratio(f"tiny {name} pipeline", found, OURS, THEIRS, target=1.0)]


def main() -> bool:
    harness.one_thread()
    rows: list[harness.Row] = []
    for case, shape, count, name, options in CASES:
        rows += guided(case, network(name, shape, options), count, rounds=11)
    if harness.available("diffusers"):
        for name in ("sd3", "sd"):
            rows += pipelines(name, rounds=11)
    return harness.report("guidance", __doc__ or "", rows, packages=("torch", "diffusers"))


if __name__ == "__main__":
    harness.finish(main)
