"""A trained model back in a stock diffusers pipeline."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn

from rectiflow.flows.fields import FlowModel
from rectiflow.interop.diffusers.families import Family, family_of_pipeline
from rectiflow.interop.diffusers.networks import PipelineNet
from rectiflow.interop.diffusers.readings import AnalyticReading, FlowReading
from rectiflow.interop.diffusers.scheduling import is_flow

WHOLE = 1000
"""Timesteps of the flow schedulers that U-Net pipelines accept; they feed whole numbers."""


def to_pipeline(model: FlowModel, pipe: Any) -> Any:
    """A stock pipeline that makes the model's images: its weights, and a scheduler that fits.

    Nothing of rectiflow is needed to run or load it: `save_pretrained` writes an ordinary folder.
    Call it with the model's number of steps, as `num_inference_steps`, and `guidance_scale=1` for
    a model that has its guidance inside. How the scheduler is chosen:

    - a diffusion model as it was read keeps the pipeline's scheduler;
    - a flow on the pipeline's own grid of times keeps it too;
    - a flow of k equal steps gets `FlowMatchEulerDiscreteScheduler` (SD 3, FLUX) without shift,
      or `UniPCMultistepScheduler` of order 1 on flow noise levels (U-Nets, whose pipelines ask
      for members the former lacks), both set to equal steps for k;
    - an analytic conversion gets DDIM, exact in one step; in several steps no stock scheduler
      follows its times.

    Args:
        model: a model of `from_pipeline`, usually reflowed or distilled since.
        pipe: the pipeline it came from, whose other parts are used, not copied.

    Raises:
        ValueError: a model that is not of this pipeline, unmerged adapters, or a number of steps
            that stock schedulers cannot take exactly.
    """
    net, family = model.net, family_of_pipeline(pipe)
    if getattr(net, "name", None) == "lora":
        raise ValueError("the model has adapters that are not merged: call merge_lora first")
    if not isinstance(net, PipelineNet):
        raise ValueError(
            f"only models of from_pipeline fit a pipeline, got a {type(net).__name__}: stacked and "
            "other networks have no place in it"
        )
    if net.family.key != family.key:
        raise ValueError(f"the model is of a {net.family.pipeline}, got a {family.pipeline}")
    module = copy.deepcopy(net.module).eval()
    if isinstance(net.reading, FlowReading) and net.reading.toward == "data":
        _negate(module, family)
    parts = {
        **pipe.components,
        family.part: module,
        "scheduler": _scheduler(model, net, family, pipe),
    }
    accepted = inspect.signature(type(pipe).__init__).parameters
    flags = {name: value for name, value in pipe.config.items() if name in accepted}
    return type(pipe)(**{**flags, **{n: p for n, p in parts.items() if n in accepted}})


def _scheduler(model: FlowModel, net: PipelineNet, family: Family, pipe: Any) -> Any:
    """The stock scheduler that takes the model's steps."""
    steps = model.sampling["steps"]
    if isinstance(net.reading, AnalyticReading):
        return _one_step_ddim(steps, pipe)
    if not isinstance(net.reading, FlowReading) or not isinstance(steps, int):
        return pipe.scheduler
    # A terminal noise level of 1/k makes the k levels 1, (k - 1)/k, ..., 1/k.
    terminal = 1 / steps if steps > 1 else None
    if family.flow:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # FLUX passes these levels itself.
        terminal = terminal if family.key != "flux" else None
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=int(net.reading.steps), shift=1.0, shift_terminal=terminal
        )
    if net.reading.steps != WHOLE:
        return _same(pipe, net.reading)
    if WHOLE % steps:
        raise ValueError(
            f"stock U-Net pipelines feed whole timesteps of {WHOLE}, which {steps} equal steps do "
            f"not meet: distil to a number of steps that divides {WHOLE}"
        )
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        # The first level is held a millionth below 1 and timesteps are cut to whole numbers: one
        # more timestep gives 1000, 1000 (k - 1)/k, ... where 1000 would give 999 first.
        num_train_timesteps=WHOLE + 1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        shift_terminal=terminal,
        solver_order=1,
        disable_corrector=list(range(steps)),
        steps_offset=1,
    )


def _same(pipe: Any, reading: FlowReading) -> Any:
    if is_flow(pipe.scheduler):
        return pipe.scheduler
    raise ValueError(
        f"the network is told timesteps up to {reading.steps:g}, stock flow schedulers for U-Nets "
        f"up to {WHOLE}: read it from a pipeline of {WHOLE} timesteps"
    )


def _one_step_ddim(steps: Any, pipe: Any) -> Any:
    if steps != 1:
        raise ValueError(
            f"no stock scheduler takes the {steps} steps of an analytic conversion at its times: "
            "distil it to one step, or start training from init='reinterpret'"
        )
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
        steps_offset=1,
    )


def _negate(module: nn.Module, family: Family) -> None:
    """Turn the output of a network round: schedulers want it to point to the noise."""
    for parameter in module.get_submodule(family.output).parameters():
        parameter.data.neg_()
