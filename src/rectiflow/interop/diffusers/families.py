"""The families of pipelines that can be read, and how each calls its network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.errors import require

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Family:
    """One family of pipelines.

    Attributes:
        key: its short name.
        pipeline: class of the pipeline in diffusers.
        part: name of the network in the pipeline.
        network: class of the network in diffusers.
        conditions: condition tensors that the network takes.
        flow: whether its models are rectified flows; the others are diffusion models, or flows
            trained from them.
        call: runs the network: (module, x, timestep, condition) to its output.
        output: name of the network's last layer.
    """

    key: str
    pipeline: str
    part: str
    network: str
    conditions: tuple[str, ...]
    flow: bool
    call: Call
    output: str


def _call_sd(module: nn.Module, x: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Any:
    return module(x, timestep, encoder_hidden_states=condition["context"], return_dict=False)[0]


def _call_sdxl(module: nn.Module, x: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Any:
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"].to(x.dtype)}
    return module(
        x,
        timestep,
        encoder_hidden_states=condition["context"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _call_sd3(module: nn.Module, x: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Any:
    return module(
        hidden_states=x,
        timestep=timestep,
        encoder_hidden_states=condition["context"],
        pooled_projections=condition["pooled"],
        return_dict=False,
    )[0]


def _call_flux(module: nn.Module, x: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Any:
    b, c, h, w = x.shape
    rows, columns = h // 2, w // 2
    packed = x.view(b, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    context = condition["context"]
    output = module(
        hidden_states=packed.reshape(b, rows * columns, 4 * c),
        # The transformer multiplies by 1000 itself.
        timestep=timestep / 1000,
        guidance=condition.get("guidance"),
        pooled_projections=condition["pooled"],
        encoder_hidden_states=context,
        txt_ids=torch.zeros(context.shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=places.view(-1, 3),
        return_dict=False,
    )[0]
    output = output.view(b, rows, columns, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(b, c, h, w)


# fmt: off
FAMILIES: dict[str, Family] = {family.key: family for family in (
    Family("sd", "StableDiffusionPipeline", "unet", "UNet2DConditionModel",
           ("context",), False, _call_sd, "conv_out"),
    Family("sdxl", "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel",
           ("context", "pooled", "time_ids"), False, _call_sdxl, "conv_out"),
    Family("sd3", "StableDiffusion3Pipeline", "transformer", "SD3Transformer2DModel",
           ("context", "pooled"), True, _call_sd3, "proj_out"),
    Family("flux", "FluxPipeline", "transformer", "FluxTransformer2DModel",
           ("context", "pooled", "guidance"), True, _call_flux, "proj_out"),
)}
# fmt: on


def family_of(name: str) -> Family:
    """The family of a pipeline class.

    Raises:
        ValueError: a class that cannot be read; says which can.

    Example:
        >>> family_of("FluxPipeline").key
        'flux'
    """
    for family in FAMILIES.values():
        if family.pipeline == name:
            return family
    accepted = ", ".join(family.pipeline for family in FAMILIES.values())
    raise ValueError(f"{name} cannot be read as a flow: accepted are {accepted}")


def open_pipeline(source: Any, *, revision: str | None = None) -> Any:
    """A diffusers pipeline: the object itself, a folder, or `owner/name` on the Hub.

    The class is checked before any weight is read, and only safetensors are read.

    Raises:
        ValueError: a class of pipeline that cannot be read.
        FileNotFoundError: a folder without a pipeline, or nothing of that name on the Hub.
    """
    require("diffusers", "diffusers", "transformers")
    import diffusers

    if not isinstance(source, str | FilePath):
        names = [kind.__name__ for kind in type(source).__mro__]
        known = {family.pipeline for family in FAMILIES.values()}
        family_of(next((name for name in names if name in known), names[0]))
        return source
    folder = FilePath(source)
    if folder.is_dir() or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"no pipeline in {source} (looked for model_index.json): give a folder saved by "
                "diffusers or owner/name on the Hub"
            )
        try:
            config = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{index} is not valid JSON ({error}): copy the folder anew") from None
    else:
        try:
            config = diffusers.DiffusionPipeline.load_config(str(source), revision=revision)
        except OSError as error:
            raise FileNotFoundError(
                f"no pipeline {source} could be read from the Hub ({str(error).splitlines()[0]})"
            ) from None
    family = family_of(str(config.get("_class_name")))
    kind = getattr(diffusers, family.pipeline)
    return kind.from_pretrained(str(source), revision=revision, use_safetensors=True)


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a pipeline object, subclasses included."""
    known = {family.pipeline: family for family in FAMILIES.values()}
    for kind in type(pipe).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    return family_of(type(pipe).__name__)
