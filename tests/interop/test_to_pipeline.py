"""Trained models back in stock pipelines: the same latents, in folders that diffusers loads."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.interop.pipelines import (
    PROMPTS,
    SIZE,
    ddim,
    noises,
    quiet,
    sd,
    shared,
    stock,
    tokens,
)
from tests.stirring import stirred

from rectiflow.distill import (
    OneStepDistillation,
    RectifiedDiffusion,
    TextReflow,
    merge_lora,
    with_lora,
)
from rectiflow.flows import FlowModel, LivePairs, sample
from rectiflow.flows.couplings import Draw
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.interop.diffusers import (
    encode_prompts,
    from_pipeline,
    to_pipeline,
    with_prompts,
)
from rectiflow.nets.stacked import Stacked

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def distilled(name: str, steps: int, **options) -> FlowModel:
    """A model as distillation leaves it: other weights, made for so many equal steps."""
    model = copy.deepcopy(from_pipeline(shared(name), size=SIZE, tokens=tokens(name), **options))
    stirred(model.net.module, 0.02, seed=11)
    model.sampling = {"solver": "euler", "steps": steps, "made_for": steps}
    return model


def ours(name: str, model: FlowModel) -> torch.Tensor:
    table = encode_prompts(shared(name), PROMPTS, tokens=tokens(name), cache=None)
    return sample(model, source=noises(), **table.everything())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("steps", [1, 4])
def test_stock_pipeline_makes_the_models_latents(name: str, steps: int) -> None:
    model = distilled(name, steps, init="reinterpret")
    pipe = quiet(to_pipeline(model, shared(name)))
    guidance = 3.5 if name == "flux" else 1.0
    found = stock(name, pipe, steps, guidance=guidance)
    torch.testing.assert_close(ours(name, model), found, **CLOSE)
    assert type(pipe) is type(shared(name))


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_saved_folder_loads_in_stock_diffusers(name: str, tmp_path) -> None:
    from diffusers import DiffusionPipeline

    model = distilled(name, 2, init="reinterpret")
    to_pipeline(model, shared(name)).save_pretrained(tmp_path / "pipe")
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    torch.testing.assert_close(ours(name, model), stock(name, again, 2), **CLOSE)
    # And back: the exported pipeline is read as the flow it is.
    back = from_pipeline(tmp_path / "pipe", size=SIZE, tokens=tokens(name), steps=2)
    assert back.path.name == "rectified"
    torch.testing.assert_close(ours(name, back), ours(name, model), **CLOSE)


def test_output_toward_data_is_turned_round() -> None:
    model = distilled("sd", 1, init="reinterpret", toward="data")
    pipe = quiet(to_pipeline(model, shared("sd")))
    torch.testing.assert_close(ours("sd", model), stock("sd", pipe, 1), **CLOSE)
    bias = model.net.module.conv_out.bias
    assert torch.equal(pipe.unet.conv_out.bias, -bias)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_one_step_of_an_analytic_model_is_ddim(name: str) -> None:
    model = distilled(name, 1, init="analytic")
    pipe = quiet(to_pipeline(model, shared(name)))
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    # One division by alpha = 0.068 magnifies rounding.
    torch.testing.assert_close(ours(name, model), stock(name, pipe, 1), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ddim", "pndm"])
@pytest.mark.parametrize("steps", [1, 4])
def test_rectified_diffusion_keeps_its_steps(kind: str, steps: int) -> None:
    from diffusers import PNDMScheduler

    scheduler = None if kind == "ddim" else PNDMScheduler.from_config(ddim().config)
    source = sd(scheduler)
    teacher = from_pipeline(source, size=SIZE)
    pairs = LivePairs(teacher, 2, labels=encode_prompts(source, PROMPTS, cache=None))
    model = RectifiedDiffusion(teacher, pairs).model.eval()
    stirred(model.net.module, 0.02, seed=11)
    model.sampling["steps"] = steps
    pipe = quiet(to_pipeline(model, source))
    # One division by alpha = 0.068 magnifies rounding.
    torch.testing.assert_close(ours("sd", model), stock("sd", pipe, steps), atol=1e-3, rtol=1e-4)


def test_models_with_times_of_their_own_are_refused() -> None:
    fitted = [0.0, 0.3, 0.45, 1.0]
    for name, init in (("sd", "native"), ("sd", "reinterpret"), ("sd3", "native")):
        model = distilled(name, 3, init=init)
        for solver in ("euler", "first-order", "renoise"):
            model.sampling = {"solver": solver, "steps": fitted}
            with pytest.raises(ValueError, match="4 times of its own, which no stock scheduler"):
                to_pipeline(model, shared(name))
    model = from_pipeline(shared("sd"), steps=3)
    model.sampling["solver"] = "first-order"
    with pytest.raises(ValueError, match=r"3 equal steps do not meet: .* divides 1000"):
        to_pipeline(model, shared("sd"))
    # DDIM itself moves by 333 timesteps here, off its own grid.
    model.sampling["steps"] = model.path.trailing(3)
    with pytest.raises(ValueError, match="4 times of its own"):
        to_pipeline(model, shared("sd"))
    model.sampling["steps"] = [0.0, 0.5, 1.0]
    assert to_pipeline(model, shared("sd")).scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flows_on_the_grid_of_the_pipeline_keep_its_scheduler(name: str) -> None:
    model = from_pipeline(shared(name), size=SIZE, steps=3, tokens=tokens(name))
    pipe = to_pipeline(model, shared(name))
    assert pipe.scheduler is shared(name).scheduler
    guidance = 3.5 if name == "flux" else 1.0
    found = stock(name, quiet(pipe), 3, guidance=guidance)
    torch.testing.assert_close(ours(name, model), found, **CLOSE)


def test_untouched_models_keep_their_scheduler() -> None:
    for name in ("sd", "sd3"):
        made = to_pipeline(from_pipeline(shared(name), steps=3, tokens=tokens(name)), shared(name))
        assert made.scheduler is shared(name).scheduler
        assert torch.equal(stock(name, quiet(made), 3), stock(name, shared(name), 3))


def test_given_pipeline_is_left_alone() -> None:
    pipe = shared("sd")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    scheduler = pipe.scheduler
    made = to_pipeline(distilled("sd", 1, init="reinterpret", toward="data"), pipe)
    assert pipe.scheduler is scheduler
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert made.vae is pipe.vae
    assert made.unet is not pipe.unet


def test_guided_pairs_reflow_distillation_and_back() -> None:
    """The whole chain on prompts: guided live pairs, reflow, one step, a stock pipeline."""
    pipe = shared("sd")
    table = encode_prompts(pipe, PROMPTS, cache=None)
    teacher = with_prompts(from_pipeline(pipe, init="analytic"), table)
    pairs = LivePairs(teacher, 2, labels=table, guided=ClassifierFreeGuidance(teacher, 2.0))
    start = with_prompts(from_pipeline(pipe, init="reinterpret"), table)
    reflow = TextReflow(with_lora(start, 2), pairs)
    draw = Draw.of(4)
    reflow.loss(draw).backward()
    moved = {n for n, p in reflow.model.named_parameters() if p.grad is not None}
    assert moved
    assert all("lora_" in name for name in moved)
    merged = merge_lora(reflow.model)
    student = OneStepDistillation(merged, pairs, condition_dropout=0.1)
    student.loss(draw).backward()
    made = quiet(to_pipeline(student.model.eval(), pipe))
    torch.testing.assert_close(ours("sd", student.model), stock("sd", made, 1), **CLOSE)


def test_refusals_say_what_to_do() -> None:
    pipe = shared("sd")
    model = from_pipeline(pipe, init="reinterpret")
    with pytest.raises(ValueError, match="adapters that are not merged: call merge_lora"):
        to_pipeline(with_lora(model, 2), pipe)
    with pytest.raises(ValueError, match=r"do not meet: distil to a number .* divides 1000"):
        to_pipeline(distilled("sd", 3, init="reinterpret"), pipe)
    with pytest.raises(ValueError, match="no stock scheduler takes the 4 steps of an analytic"):
        to_pipeline(distilled("sd", 4, init="analytic"), pipe)
    with pytest.raises(ValueError, match="is of a StableDiffusionPipeline, got a StableD"):
        to_pipeline(model, shared("sd3"))
    stacked = FlowModel(Stacked.of(model.net), shape=model.shape)
    with pytest.raises(ValueError, match="got a Stacked: stacked and other networks have no place"):
        to_pipeline(stacked, pipe)


def test_stacked_students_take_prompts() -> None:
    pipe = shared("sd")
    table = encode_prompts(pipe, PROMPTS, cache=None)
    model = from_pipeline(pipe, init="reinterpret")
    stack = Stacked.of(model.net, mode="residual")
    given, x, t = table.everything(), noises(), torch.zeros(2)
    stack.check(x, **given)
    with torch.no_grad():
        first = model.velocity(x, t, **given)
        expected = first + model.velocity(x + first, t, **given)
        torch.testing.assert_close(stack(x, t, **given), expected)
    assert stack.null_condition(**given)["context"].shape == given["context"].shape
