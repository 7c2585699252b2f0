"""Prompts as condition tensors: encoded once, kept on disk, looked up by row number."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.errors import positive
from rectiflow.files import atomic_path, cache_folder
from rectiflow.flows.fields import FlowModel
from rectiflow.interop.diffusers.families import Family, family_of_pipeline
from rectiflow.interop.diffusers.networks import PipelineNet
from rectiflow.interop.diffusers.prompt_table import PromptTable

CHUNK = 256
VERSION = 1


def encode_prompts(
    pipe: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    tokens: int | None = None,
    cache: Path | str | None = "default",
    progress: Callable[[int], None] | None = None,
) -> PromptTable:
    """Encode prompts with a pipeline's text encoders.

    Finished chunks are kept on disk by the content of prompts and encoders, so another run reads
    them, a killed one goes on where it stopped, and memory holds one chunk at a time.

    Args:
        pipe: the pipeline, of which only tokenizers and text encoders are used.
        prompts: the texts.
        batch_size: prompts encoded together.
        tokens: length of T5's part for Stable Diffusion 3 (256) and FLUX (512).
        cache: folder of the chunks; rectiflow's own by default, None to keep them in memory.
        progress: called with the number of prompts done.

    Raises:
        ValueError: no prompts, something that is not text, or a pipeline without text encoders.
    """
    positive("batch_size", batch_size)
    prompts = tuple(prompts)
    if not prompts:
        raise ValueError("there are no prompts to encode: give one or more texts")
    wrong = next((one for one in prompts if not isinstance(one, str)), None)
    if wrong is not None:
        raise ValueError(f"prompts must be texts, got {type(wrong).__name__}")
    if cache == "default":
        cache = cache_folder() / "prompts"
    family = family_of_pipeline(pipe)
    null = null_of(pipe, tokens=tokens)
    if not null:
        raise ValueError(f"this {family.pipeline} has no text encoders: load it with them")
    encoders = _fingerprint(pipe, family, tokens)
    chunks = []
    for begin in range(0, len(prompts), CHUNK):
        part = prompts[begin : begin + CHUNK]
        chunks.append(_chunk(pipe, family, part, batch_size, tokens, encoders, cache))
        if progress is not None:
            progress(begin + len(part))
    digest = hashlib.sha256(json.dumps([encoders, prompts]).encode()).hexdigest()
    return PromptTable(prompts, tuple(chunks), null, digest, CHUNK)


def with_prompts(model: FlowModel, table: PromptTable) -> FlowModel:
    """The model of a pipeline with a table of prompts, so that it takes `prompt=` row numbers.

    The weights are shared with the model given. The table's digest enters the lineage, so pairs
    made with other prompts are told apart.

    Raises:
        ValueError: a model that does not come from a pipeline.
    """
    if not _reads_prompts(model.net):
        raise ValueError(
            f"prompts belong to models of from_pipeline, got a {type(model.net).__name__}"
        )
    net = _with_table(model.net, table)
    entry = {"method": "prompts", "count": len(table), "sha256": table.digest[:12]}
    return FlowModel(
        net,
        model.path,
        model.prediction,
        shape=model.shape,
        sampling=model.sampling,
        data=model.data,
        lineage=[*(e for e in model.lineage if e.get("method") != "prompts"), entry],
    ).train(model.training)


def _reads_prompts(net: Any) -> bool:
    """Whether a network is one of a pipeline, or made of such (stacked, with adapters)."""
    return isinstance(net, nn.Module) and any(isinstance(m, PipelineNet) for m in net.modules())


def _with_table(net: nn.Module, table: PromptTable) -> nn.Module:
    """The network with a table, sharing its weights."""
    found = copy.copy(net)
    if isinstance(found, PipelineNet):
        found.prompts = table
        return found
    parts = {
        name: _with_table(part, table) if _reads_prompts(part) else part
        for name, part in net.named_children()
    }
    found.__dict__["_modules"] = {**net._modules, **parts}
    return found


@torch.no_grad()
def null_of(pipe: Any, *, tokens: int | None = None) -> dict[str, Tensor]:
    """The condition of the empty prompt, one row; nothing for a pipeline without text encoders."""
    if getattr(pipe, "text_encoder", None) is None:
        return {}
    family = family_of_pipeline(pipe)
    return {name: value.cpu() for name, value in _encode(pipe, family, [""], tokens, True).items()}


def _encode(
    pipe: Any, family: Family, prompts: Sequence[str], tokens: int | None, null: bool
) -> dict[str, Tensor]:
    """Condition tensors of prompts, or those that the pipeline uses for "no prompt"."""
    texts = list(prompts)
    length = {} if tokens is None else {"max_sequence_length": tokens}
    if family.key == "flux":
        context, pooled, _ = pipe.encode_prompt(texts, None, device=pipe.device, **length)
        return {"context": context, "pooled": pooled}
    if family.key == "sd":
        given, empty = pipe.encode_prompt(texts, pipe.device, 1, null)
        return {"context": empty if null else given}
    if family.key == "sdxl":
        found = pipe.encode_prompt(texts, device=pipe.device, do_classifier_free_guidance=null)
    else:
        found = pipe.encode_prompt(
            texts, None, None, device=pipe.device, do_classifier_free_guidance=null, **length
        )
    context, pooled = (found[1], found[3]) if null else (found[0], found[2])
    return {"context": context, "pooled": pooled}


@torch.no_grad()
def _chunk(
    pipe: Any,
    family: Family,
    prompts: Sequence[str],
    batch_size: int,
    tokens: int | None,
    encoders: str,
    cache: Path | str | None,
) -> dict[str, Tensor]:
    """The condition of some prompts, from the cache if it is there and whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    key = hashlib.sha256(json.dumps([encoders, list(prompts)]).encode()).hexdigest()
    file = Path(cache) / f"{key}.safetensors" if cache is not None else None
    if file is not None and file.is_file():
        try:
            return load_file(file)
        except (SafetensorError, OSError):
            file.unlink(missing_ok=True)
    parts = [
        _encode(pipe, family, prompts[begin : begin + batch_size], tokens, False)
        for begin in range(0, len(prompts), batch_size)
    ]
    found = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    if file is None:
        return found
    with atomic_path(file) as temporary:
        temporary.write_bytes(save({name: value.contiguous() for name, value in found.items()}))
    return load_file(file)


def _fingerprint(pipe: Any, family: Family, tokens: int | None) -> str:
    """Tells encoders apart: vocabularies, and some numbers of every weight."""
    total = hashlib.sha256(f"{VERSION} {family.key} {tokens}".encode())
    for suffix in ("", "_2", "_3"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if tokenizer is not None:
            words = sorted(tokenizer.get_vocab().items())
            total.update(json.dumps([tokenizer.model_max_length, words]).encode())
        if encoder is not None:
            for name, weight in sorted(encoder.state_dict().items()):
                flat = weight.detach().flatten()
                some = flat[:: max(1, flat.numel() // 16)][:17].double().cpu()
                total.update(f"{name}{tuple(weight.shape)}{some.tolist()}".encode())
    return total.hexdigest()
