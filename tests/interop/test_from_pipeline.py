"""Pipelines read as flow models: the same latents as stock diffusers, on its own grid of times."""

from __future__ import annotations

import json

import pytest
import torch
from tests.interop.pipelines import (
    PROMPTS,
    SIZE,
    ddim,
    flow_scheduler,
    flux,
    noises,
    sd,
    sd3,
    sdxl,
    shared,
    stock,
    tokens,
    vae,
)

from rectiflow.flows import FlowModel, integrate, sample
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.interop.diffusers import (
    PipelineNet,
    decode_latents,
    encode_images,
    encode_prompts,
    from_pipeline,
    stock_times,
    with_prompts,
)
from rectiflow.interop.diffusers.prompt_table import PromptTable

FLOWS = ("sd3", "flux")
DIFFUSIONS = ("sd", "sdxl")
# Single precision over a few steps of a small net; times pass through 1 - t (6e-5 timesteps).
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def read(name: str, **options) -> FlowModel:
    return from_pipeline(shared(name), size=SIZE, tokens=tokens(name), **options)


def condition(name: str) -> dict[str, torch.Tensor]:
    pipe = shared(name)
    return encode_prompts(pipe, PROMPTS, tokens=tokens(name), cache=None).everything()


@pytest.mark.parametrize("name", FLOWS)
def test_flows_sample_as_stock_does(name: str) -> None:
    steps = 4
    given = condition(name)
    if name == "flux":
        given["guidance"] = torch.full((len(PROMPTS),), 2.5)
    ours = sample(read(name, steps=steps), source=noises(), **given)
    expected = stock(name, shared(name), steps, guidance=2.5 if name == "flux" else 1.0)
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (ours - noises()).abs().mean() > 0.05


def test_dual_attention_of_the_larger_version() -> None:
    pipe = sd3(medium=True)
    given = encode_prompts(pipe, PROMPTS, tokens=12, cache=None).everything()
    ours = sample(from_pipeline(pipe, steps=3, tokens=12), source=noises(), **given)
    torch.testing.assert_close(ours, stock("sd3", pipe, 3), **CLOSE)


@pytest.mark.parametrize("name", DIFFUSIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "timestep_spacing": "trailing"},
        {"set_alpha_to_one": False},
    ],
    ids=["epsilon", "v", "sample", "end"],
)
def test_analytic_euler_is_ddim(name: str, options: dict) -> None:
    """Invariant 6, at every number of steps: Euler on the converted flow is DDIM."""
    made = {"sd": sd, "sdxl": sdxl}[name](ddim(**options))
    times = stock_times(made, 5)
    first, last = torch.tensor(times[0]), torch.tensor(times[-1])
    start = noises() * (first**2 + (1 - first) ** 2).sqrt()
    end = integrate(from_pipeline(made, init="analytic"), start, times, **condition(name))
    ours = end / (last**2 + (1 - last) ** 2).sqrt()
    torch.testing.assert_close(ours.detach(), stock(name, made, 5), **CLOSE)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_guidance_is_that_of_stock(name: str) -> None:
    pipe = shared(name)
    times = stock_times(pipe, 3)
    start = noises() * (times[0] ** 2 + (1 - times[0]) ** 2) ** 0.5
    guided = ClassifierFreeGuidance(from_pipeline(pipe, init="analytic"), 3.0)
    with torch.no_grad():
        ours = integrate(guided, start, times, **condition(name))
    expected = stock(name, pipe, 3, guidance=3.0)
    torch.testing.assert_close(ours, expected, atol=5e-4, rtol=5e-4)  # three times the error
    assert (ours - stock(name, pipe, 3)).abs().max() > 1e-2


def test_guidance_of_a_flow_is_that_of_stock() -> None:
    guided = ClassifierFreeGuidance(read("sd3"), 2.0)
    with torch.no_grad():
        times = stock_times(shared("sd3"), 3)
        ours = integrate(guided, noises(), times, **condition("sd3"))
    torch.testing.assert_close(ours, stock("sd3", shared("sd3"), 3, guidance=2.0), **CLOSE)


@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_analytic_and_native_are_one_flow_in_two_coordinates(output: str) -> None:
    """Invariant 6 in the limit: x = c y and u(t) turn one velocity into the other at every point.

    So both flows end alike in the limit of many steps.
    """
    pipe = sd(ddim(prediction_type=output))
    native, analytic = from_pipeline(pipe), from_pipeline(pipe, init="analytic")
    given, y = condition("sd"), noises()
    t = native.path.time(torch.tensor([300.4, 700.6]))
    alpha, sigma = native.path.alpha(t), native.path.sigma(t)
    slope = native.path.dalpha(t) / (alpha * sigma**2)  # of log(alpha / sigma)
    u = alpha / (alpha + sigma)
    c = (u**2 + (1 - u) ** 2).sqrt()
    wide = (-1, 1, 1, 1)
    with torch.no_grad():
        carried = native.velocity(y, t, **given) / (slope * u * (1 - u)).view(wide)
        expected = ((2 * u - 1) / c).view(wide) * y + c.view(wide) * carried
        found = analytic.velocity(c.view(wide) * y, u, **given)
    # The native velocity is a small difference of large terms.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_predictions_agree_with_the_scheduler(output: str) -> None:
    pipe = sd(ddim(prediction_type=output))
    model, given, x = from_pipeline(pipe), condition("sd"), noises()
    with torch.no_grad():
        raw = pipe.unet(x, 400, encoder_hidden_states=given["context"]).sample
        pipe.scheduler.set_timesteps(10)
        expected = pipe.scheduler.step(raw, torch.tensor(400), x).pred_original_sample
        ours = model.denoise(x, model.path.time(torch.full((2,), 400.0)), **given)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_analytic_is_finite_with_gradients_at_both_ends(output: str) -> None:
    zero = output == "v_prediction"
    pipe = sd(ddim(prediction_type=output, rescale_betas_zero_snr=zero))
    model = from_pipeline(pipe, init="analytic").requires_grad_(True)
    x = noises(5).requires_grad_()
    t = torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
    model.velocity(x, t).square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_network_is_told_the_papers_times() -> None:
    """Invariant 2: 1000, 750, 500, 250 in four steps of a quarter; latent + v in one."""
    model = from_pipeline(shared("sd"), init="reinterpret", toward="data")
    fed: list[float] = []
    handle = model.net.module.register_forward_pre_hook(
        lambda module, args: fed.append(float(args[1][0]))
    )
    x, given = noises(), condition("sd")
    try:
        sample(model, source=x, steps=4, **given)
        assert fed == pytest.approx([1000, 750, 500, 250])
        one = sample(model, source=x, steps=1, **given)
    finally:
        handle.remove()
    with torch.no_grad():
        said = shared("sd").unet(x, 1000.0, encoder_hidden_states=given["context"]).sample
    torch.testing.assert_close(one, x + said)
    away = from_pipeline(shared("sd"), init="reinterpret")
    torch.testing.assert_close(sample(away, source=x, steps=1, **given), x - said)


@pytest.mark.parametrize("name", [*FLOWS, *DIFFUSIONS])
def test_null_condition(name: str) -> None:
    model, given, x = read(name), condition(name), noises()
    null = model.null_condition(**given)
    assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in given.items()}
    t = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        # What is not given is null.
        torch.testing.assert_close(model.velocity(x, t, **null), model.velocity(x, t), **CLOSE)
        assert not torch.allclose(model.velocity(x, t, **given), model.velocity(x, t), atol=1e-4)


@pytest.mark.parametrize("init", ["native", "analytic", "reinterpret"])
def test_half_precision_pipelines_take_float32_states(init: str) -> None:
    pipe = sd()
    pipe.unet.to(torch.bfloat16)
    model = from_pipeline(pipe, init=init, size=SIZE)
    made = sample(model, 2, steps=2, generator=torch.Generator().manual_seed(0))
    assert made.dtype == torch.float32
    assert made.isfinite().all()


def test_prompts_are_looked_up_once_for_all_steps(monkeypatch) -> None:
    pipe = shared("sd")
    table = encode_prompts(pipe, PROMPTS, cache=None)
    model = with_prompts(from_pipeline(pipe, init="reinterpret", size=SIZE), table)
    looked, rows = [], PromptTable.rows
    monkeypatch.setattr(PromptTable, "rows", lambda *given: looked.append(1) or rows(*given))
    x, prompt = noises(), torch.tensor([1, 0])
    first = sample(model, source=x, steps=3, prompt=prompt)
    assert len(looked) == 1
    prompt.copy_(torch.tensor([0, 1]))
    second = sample(model, source=x.flip(0), steps=3, prompt=prompt)
    assert len(looked) == 2
    torch.testing.assert_close(second.flip(0), first, **CLOSE)
    again = with_prompts(model, encode_prompts(pipe, PROMPTS[::-1], cache=None))
    third = sample(again, source=x, steps=3, prompt=prompt)
    torch.testing.assert_close(third, first, **CLOSE)


def test_direction_belongs_to_flows() -> None:
    for init in ("native", "analytic"):
        with pytest.raises(ValueError, match="toward='data' says where a flow's output points"):
            from_pipeline(shared("sd"), init=init, toward="data")


def test_sizes_of_sdxl_are_a_condition() -> None:
    model, x, t = read("sdxl"), noises(), torch.full((2,), 0.5)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(x, t, time_ids=ids), model.velocity(x, t))
        other = model.velocity(x, t, time_ids=ids * 2)
    assert not torch.allclose(other, model.velocity(x, t), atol=1e-5)


def test_model_folder_opens_again(tmp_path) -> None:
    for name, init in (("sd3", "native"), ("sd", "analytic"), ("sd", "native")):
        model = read(name, init=init)
        folder = model.save_pretrained(tmp_path / f"{name}-{init}")
        again = FlowModel.from_pretrained(folder)
        assert isinstance(again.net, PipelineNet)
        given, x, t = condition(name), noises(), torch.tensor([0.2, 0.8])
        with torch.no_grad():
            assert torch.equal(model.velocity(x, t, **given), again.velocity(x, t, **given))
            assert torch.equal(model.velocity(x, t), again.velocity(x, t))
        assert again.path == model.path
        assert again.sampling == model.sampling


def test_latents_are_those_of_stock() -> None:
    for name, made in (("sd", sd()), ("sd3", shared("sd3")), ("sdxl", sdxl())):
        if name == "sdxl":
            made.vae = vae(latents_mean=[0.1] * 4, latents_std=[0.5, 1, 2, 4], scaling_factor=0.2)
        latents = noises()
        ours = decode_latents(made, latents, batch_size=1)
        with torch.no_grad():
            config = made.vae.config
            if name == "sdxl":
                std = torch.tensor([0.5, 1, 2, 4]).view(1, 4, 1, 1)
                raw = latents * std / 0.2 + 0.1
            else:
                raw = latents / config.scaling_factor + (config.shift_factor or 0)
            torch.testing.assert_close(ours, made.vae.decode(raw).sample)
            images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
            back = encode_images(made, images)
            mode = made.vae.encode(images).latent_dist.mode()
            # The inverse of what decoding does.
            gain = 0.2 / std if name == "sdxl" else config.scaling_factor
            less = 0.1 if name == "sdxl" else config.shift_factor or 0
            torch.testing.assert_close(back, (mode - less) * gain)
    with pytest.raises(ValueError, match="sides in multiples of 2"):
        encode_images(shared("sd"), torch.zeros(1, 3, 15, 16))


def test_folder_is_read_like_the_object(tmp_path) -> None:
    shared("sd3").save_pretrained(tmp_path / "pipe")
    again = from_pipeline(tmp_path / "pipe", size=SIZE, steps=3, tokens=12)
    ours = sample(again, source=noises(), **condition("sd3"))
    torch.testing.assert_close(ours, stock("sd3", shared("sd3"), 3), **CLOSE)
    assert again.lineage[0]["source"] == str(tmp_path / "pipe")


def test_unknown_pipelines_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="dict cannot be read as a flow: accepted are StableDiff"):
        from_pipeline({})
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(ValueError, match=r"DiTPipeline cannot be read .* FluxPipeline"):
        from_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        from_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match="looked for model_index"):
        from_pipeline(tmp_path / "absent")


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="DDIMScheduler predicts 'epsilon' but SD3Transformer2D"):
        from_pipeline(sd3(ddim()))
    with pytest.raises(ValueError, match="ends in pure noise, where predicting epsilon"):
        from_pipeline(sd(ddim(rescale_betas_zero_snr=True)))
    from diffusers import EDMEulerScheduler

    pipe = sd()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler with prediction 'epsilon' has no"):
        from_pipeline(pipe)
    with pytest.raises(ValueError, match="unknown init 'analytical': did you mean 'analytic'"):
        from_pipeline(shared("sd"), init="analytical")
    with pytest.raises(ValueError, match="size must be height and width in multiples of 4"):
        from_pipeline(shared("flux"), size=(18, 16))


def test_wrong_conditions_are_named() -> None:
    model, x = read("sd"), noises()
    with pytest.raises(ValueError, match="takes the conditions context, prompt, got 'pooled'"):
        model.check(x, pooled=x)
    with pytest.raises(ValueError, match=r"rows of shape \(16, 8\), got \(4, 8\)"):
        model.check(x, context=torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="one row for each of the 2 samples"):
        model.check(x, context=torch.zeros(1, 16, 8))
    with pytest.raises(ValueError, match="call with_prompts first"):
        model.velocity(x, torch.zeros(2), prompt=torch.tensor([0, 1]))
    model.check(x, context=torch.zeros(2, 16, 8))


def test_dynamic_shift_needs_a_shape() -> None:
    with pytest.raises(ValueError, match="give the latents' shape"):
        stock_times(shared("flux"), 3)
    plain = flux(flow_scheduler())
    assert stock_times(plain, 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
