"""A pipeline as a flow model in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from rectiflow.errors import positive
from rectiflow.flows.fields import FlowModel
from rectiflow.interop.diffusers.families import Family, family_of_pipeline, open_pipeline
from rectiflow.interop.diffusers.networks import PipelineNet
from rectiflow.interop.diffusers.prompts import null_of
from rectiflow.interop.diffusers.scheduling import read_scheduler, stock_solver, stock_times

STEPS = 25


def from_pipeline(
    source: Any,
    *,
    init: str = "native",
    size: Sequence[int] | None = None,
    steps: int = STEPS,
    guidance: float = 3.5,
    tokens: int | None = None,
    toward: str = "noise",
    revision: str | None = None,
) -> FlowModel:
    """The network of a diffusers pipeline as a `FlowModel` of scaled latents, from noise to data.

    Takes Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and 3.5, and FLUX. The result is a
    field like any other: sample it, guide it, follow it for pairs, reflow and distil it. Images
    and prompts pass through `decode_latents` and `encode_prompts`. The pipeline's own network is
    used, not copied.

    Args:
        source: a pipeline, a folder that diffusers saved, or `owner/name` on the Hub.
        init: how a diffusion network is read; flows are always read as they are. "native" keeps
            its own path and prediction; "analytic" converts it exactly to a rectified flow, the
            best teacher and a fast start; "reinterpret" reads its output as a velocity, right
            only after training (the paper's start, and what stock pipelines can run).
        size: height and width of the images; the pipeline's own by default.
        steps: number of steps that the model is sampled with unless told otherwise.
        guidance: FLUX's built-in guidance, where the caller gives none.
        tokens: length of T5's part of the null condition, as given to `encode_prompts`.
        toward: "data" for networks whose output points from noise to data, such as InstaFlow's;
            for networks that are read as flows only.
        revision: revision on the Hub.

    Raises:
        ValueError: an unknown class of pipeline, a network that makes no latents from latents, a
            scheduler that contradicts it, or a size that the pipeline cannot make.
        FileNotFoundError: no pipeline there.

    Source: arXiv 2309.06380, section 3; exact conversion: arXiv 2405.20320, proposition 1.
    """
    positive("steps", steps)
    pipe = open_pipeline(source, revision=revision)
    family = family_of_pipeline(pipe)
    module = getattr(pipe, family.part)
    reading = read_scheduler(pipe.scheduler, family, init=init, toward=toward)
    shape = _latent_shape(pipe, family, size)
    net = PipelineNet(
        shape=shape,
        family=family.key,
        module=module,
        reading=reading,
        null=null_of(pipe, tokens=tokens),
        defaults=_defaults(family, module, shape, pipe.vae_scale_factor, guidance),
    )
    times: Any = steps
    solver = "heun" if reading.kind == "table" else "euler"
    if reading.kind == "flow" and init != "reinterpret":
        times, solver = stock_times(pipe, steps, shape=shape), stock_solver(pipe.scheduler)
    named = source if isinstance(source, str | FilePath) else getattr(pipe, "name_or_path", "")
    entry = {
        "method": "pipeline",
        "class": family.pipeline,
        "source": str(named or ""),
        "init": init if reading.kind != "flow" or init == "reinterpret" else "native",
    }
    return FlowModel(
        net,
        reading.path,
        reading.prediction,
        shape=shape,
        sampling={"solver": solver, "steps": times},
        data={"name": "latents", "pipeline": family.pipeline},
        lineage=[entry],
    ).eval()


def _latent_shape(pipe: Any, family: Family, size: Sequence[int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the latents."""
    config, scale = getattr(pipe, family.part).config, pipe.vae_scale_factor
    channels = config.in_channels // 4 if family.key == "flux" else config.in_channels
    out = config.out_channels if config.out_channels is not None else config.in_channels
    if family.key != "flux" and out != config.in_channels:
        raise ValueError(
            f"{family.network} makes {out} channels of {config.in_channels}: networks for "
            "inpainting and other extra inputs are not accepted, take the text-to-image model"
        )
    if size is None:
        own = pipe.default_sample_size if family.key == "flux" else config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
    else:
        least = scale * (2 if family.flow else 1)
        if len(size) != 2 or any(side < 1 or side % least for side in size):
            raise ValueError(f"size must be height and width in multiples of {least}, got {size}")
        height, width = (side // scale for side in size)
    return channels, int(height), int(width)


def _defaults(
    family: Family, module: Any, shape: Sequence[int], scale: int, guidance: float
) -> dict[str, Any]:
    """Conditions that the pipeline fills in by itself."""
    if family.key == "sdxl":
        height, width = float(shape[1] * scale), float(shape[2] * scale)
        return {"time_ids": [height, width, 0.0, 0.0, height, width]}
    if family.key == "flux" and module.config.guidance_embeds:
        return {"guidance": float(guidance)}
    return {}
