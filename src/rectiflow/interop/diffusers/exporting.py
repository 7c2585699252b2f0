"""A trained model back in a stock diffusers pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from rectiflow.flows.fields import FlowModel
from rectiflow.flows.integration import time_grid
from rectiflow.interop.diffusers.families import Family, family_of_pipeline
from rectiflow.interop.diffusers.networks import PipelineNet
from rectiflow.interop.diffusers.readings import AnalyticReading, FlowReading, TableReading
from rectiflow.interop.diffusers.scheduling import is_flow, stock_solver, stock_times

WHOLE = 1000
"""Timesteps of the flow schedulers that U-Net pipelines accept; they feed whole numbers."""


def to_pipeline(model: FlowModel, pipe: Any) -> Any:
    """A stock pipeline that makes the model's images: its weights, and a scheduler that fits.

    Nothing of rectiflow is needed to run or load it: `save_pretrained` writes an ordinary folder.
    Call it with the model's number of steps, as `num_inference_steps`, and `guidance_scale=1` for
    a model that has its guidance inside. How the scheduler is chosen:

    - a diffusion model as it was read keeps the pipeline's scheduler;
    - one that is sampled by first-order steps (rectified diffusion) gets DDIM with "trailing"
      spacing, which starts where they do;
    - a flow on the pipeline's own grid of times keeps its scheduler too;
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
            or times that stock schedulers cannot take exactly.
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
    steps, solver = model.sampling["steps"], model.sampling["solver"]
    if isinstance(net.reading, AnalyticReading):
        return _one_step_ddim(steps, pipe)
    if isinstance(net.reading, TableReading):
        if solver == "first-order":
            return _trailing_ddim(steps, net.reading, pipe)
        if isinstance(steps, int):
            return pipe.scheduler
        raise ValueError(_own_times(len(steps) - 1))
    if not isinstance(steps, int):
        if is_flow(pipe.scheduler) and _on_stock_grid(steps, solver, net, pipe):
            return pipe.scheduler
        raise ValueError(_own_times(len(steps) - 1))
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
    return _ddim(pipe)


def _trailing_ddim(steps: Any, reading: TableReading, pipe: Any) -> Any:
    """DDIM at the times of first-order steps, which must be whole timesteps."""
    times, count = time_grid(steps), reading.path.count
    taken = len(times) - 1
    if not _same_times(times, time_grid(taken)):
        raise ValueError(_own_times(taken))
    if count % taken:
        raise ValueError(
            f"stock schedulers take whole timesteps of {count}, which {taken} equal steps do not "
            f"meet: sample it with a number of steps that divides {count}"
        )
    return _ddim(pipe)


def _ddim(pipe: Any) -> Any:
    """DDIM on the pipeline's schedule, from pure noise to clean data."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
        steps_offset=1,
    )


def _on_stock_grid(times: Sequence[float], solver: Any, net: PipelineNet, pipe: Any) -> bool:
    """Whether a flow's times are those of its pipeline, and its steps too."""
    own = stock_solver(pipe.scheduler)
    # On straight lines first-order steps are Euler's.
    known = solver == own or (solver, own) == ("first-order", "euler")
    return known and _same_times(times, stock_times(pipe, len(times) - 1, shape=net.shape))


def _same_times(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(abs(a - b) < 1e-6 for a, b in zip(first, second))


def _own_times(steps: int) -> str:
    return (
        f"the model is sampled at {steps + 1} times of its own, which no stock scheduler takes: "
        "export the flow before its times were fitted, or set its sampling to a number of steps"
    )


def _negate(module: nn.Module, family: Family) -> None:
    """Turn the output of a network round: schedulers want it to point to the noise."""
    for parameter in module.get_submodule(family.output).parameters():
        parameter.data.neg_()
