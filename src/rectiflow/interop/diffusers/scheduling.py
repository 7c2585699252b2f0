"""What a pipeline's scheduler says: prediction, path and grid of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rectiflow.errors import positive, unknown
from rectiflow.flows.solvers import RFSolver
from rectiflow.interop.diffusers.families import Family, family_of_pipeline
from rectiflow.interop.diffusers.readings import (
    OUTPUTS,
    AnalyticReading,
    FlowReading,
    Reading,
    TableReading,
)

INITS = ("native", "analytic", "reinterpret")


def read_scheduler(
    scheduler: Any, family: Family, *, init: str = "native", toward: str = "noise"
) -> Reading:
    """The reading of a network under its pipeline's scheduler.

    Raises:
        ValueError: the scheduler contradicts the network, or its schedule cannot be read.
    """
    if init not in INITS:
        raise unknown("init", init, INITS)
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type")
    if is_flow(scheduler):
        steps = float(config["num_train_timesteps"])
        # Solvers other than Euler's feed whole timesteps, from one below the number they train on.
        return FlowReading(steps if _matches_flows(scheduler) else steps - 1, toward)
    if family.flow:
        raise ValueError(
            f"{name} predicts {prediction!r} but {family.network} predicts a flow's velocity: load "
            "the pipeline with its FlowMatchEulerDiscreteScheduler"
        )
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or prediction not in OUTPUTS:
        raise ValueError(
            f"{name} with prediction {prediction!r} has no schedule for {family.network}: accepted "
            f"are DDPM-type schedulers that predict {', '.join(OUTPUTS)}, and flow schedulers"
        )
    if prediction == "epsilon" and float(table[-1]) < 1e-6:
        raise ValueError(
            f"{name} ends in pure noise, where predicting epsilon says nothing about the data: "
            "set prediction_type='v_prediction', or rescale_betas_zero_snr=False"
        )
    if init == "reinterpret":
        return FlowReading(float(config["num_train_timesteps"]), toward)
    if toward != "noise":
        raise ValueError(
            f"toward={toward!r} says where a flow's output points, and the network is read as a "
            f"diffusion's {prediction}: read it with init='reinterpret'"
        )
    kind = AnalyticReading if init == "analytic" else TableReading
    return kind(tuple(table.tolist()), prediction)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler follows a rectified flow."""
    return _matches_flows(scheduler) or scheduler.config.get("prediction_type") == "flow_prediction"


def stock_solver(scheduler: Any) -> str:
    """The solver by which a flow scheduler steps, among those that both sides have.

    Example:
        >>> stock_solver(None)
        'euler'
    """
    return RFSolver(scheduler.theta).spec if _is_rf_solver(scheduler) else "euler"


def _matches_flows(scheduler: Any) -> bool:
    """Whether a scheduler is one of diffusers' flow schedulers, or made of one."""
    return any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__)


def _is_rf_solver(scheduler: Any) -> bool:
    return type(scheduler).__name__ == "RFSolverScheduler"


def stock_times(pipe: Any, steps: int, *, shape: Sequence[int] | None = None) -> list[float]:
    """The times at which the stock pipeline evaluates its network, as our grid.

    For a flow these are its scheduler's noise levels, shifts included. For a diffusion model they
    are those of DDIM on its schedule, for a model read with `init="analytic"`: Euler steps on
    this grid are DDIM's, if they start from `sqrt(t² + (1 - t)²)` times the noise at its first
    time.

    Args:
        pipe: the pipeline.
        steps: its `num_inference_steps`.
        shape: shape of the latents, for schedulers that shift by resolution.

    Returns:
        `steps + 1` rising times.

    Raises:
        ValueError: a resolution-dependent scheduler without a shape.
    """
    positive("steps", steps)
    import numpy as np

    family = family_of_pipeline(pipe)
    scheduler = pipe.scheduler
    if not is_flow(scheduler):
        return _ddim_times(scheduler, family, steps)
    twin = type(scheduler).from_config(scheduler.config)
    options: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        if shape is None:
            raise ValueError("the scheduler shifts times by resolution: give the latents' shape")
        options["mu"] = _shift(scheduler.config, shape)
    if family.key == "flux":
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    else:
        options["num_inference_steps"] = steps
    twin.set_timesteps(**options)
    # Those of RF-Solver have its trial moves between the steps.
    levels = twin.sigmas[::2] if _is_rf_solver(twin) else twin.sigmas
    times = [1 - float(sigma) for sigma in levels]
    # Some schedulers stay a millionth below pure noise to divide by it.
    return [0.0 if times[0] < 1e-5 else times[0], *times[1:]]


def _ddim_times(scheduler: Any, family: Family, steps: int) -> list[float]:
    from diffusers import DDIMScheduler

    reading = read_scheduler(scheduler, family, init="analytic")
    assert isinstance(reading, AnalyticReading)
    twin = DDIMScheduler.from_config(scheduler.config)
    twin.set_timesteps(steps)
    last = 1.0 if twin.config.set_alpha_to_one else reading.time(0.0)
    times = [reading.time(float(step)) for step in twin.timesteps]
    # The last timestep may be the table's first, which is then already the end.
    return [*[t for t in times if t < last], last]


def _shift(config: Any, shape: Sequence[int]) -> float:
    """The exponent of the resolution-dependent shift: linear in the number of 2x2 patches."""
    count = (shape[-2] // 2) * (shape[-1] // 2)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    shift = base + slope * (count - low)
    assert math.isfinite(shift)
    return shift
