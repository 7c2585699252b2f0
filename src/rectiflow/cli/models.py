"""Models for commands: our own folders and diffusers pipelines, opened alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.cli.options import choose_device, data_of, labels_for
from rectiflow.training.runs import PIPELINE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.flows.fields import FlowModel


@dataclass(eq=False)
class Opened:
    """A model with what stands between its samples and images.

    Attributes:
        model: the model on its device, with its prompts attached.
        device: where it is.
        source: folder or name of the pipeline whose VAE and text encoders it needs, if any.
        prompts: the texts that `condition` hands out in turn.
        negative: the condition to guide away from, where a text was given for it.
    """

    model: FlowModel
    device: Any
    source: str | None = None
    prompts: tuple[str, ...] = ()
    negative: dict[str, Any] | None = None

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, read when it is first needed; None for a model of images.

        Raises:
            FileNotFoundError: the model was made from a pipeline that is not there any more.
        """
        if not is_latent(self.model):
            return None
        try:
            return read_pipeline(self.source or "").to(self.device)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the model makes latents of a {self.model.data.get('pipeline')} and needs its VAE "
                f"and text encoders ({error}): name the pipeline by --pipeline"
            ) from None

    def condition(
        self, count: int, label: int | None = None, generator: Any = None
    ) -> dict[str, Any]:
        """The condition of so many samples: the prompts in turn, one class, or random classes.

        Args:
            count: samples.
            label: a class of a model that takes labels; drawn from `generator` by default.
            generator: the source of randomness.

        Raises:
            ValueError: a label that the model does not have.
        """
        import torch

        if self.prompts:
            if label is not None:
                raise ValueError("--label was given but the model takes prompts: use --prompt")
            return {"prompt": torch.arange(count, device=self.device) % len(self.prompts)}
        found = labels_for(self.model, count, label, generator)
        return {name: value.to(self.device) for name, value in found.items()}

    def images(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Samples as images, about in [-1, 1]: decoded by the VAE, or as they are."""
        if self.pipe is None:
            return x
        from rectiflow.interop.diffusers import decode_latents

        return decode_latents(self.pipe, x)

    def latents(self, images: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Images in [-1, 1] as samples of the model: encoded by the VAE, or as they are."""
        if self.pipe is None:
            return images
        from rectiflow.interop.diffusers import encode_images

        return encode_images(self.pipe, images)


def open_model(
    spec: str,
    *,
    device: str = "auto",
    prompt: Sequence[str] = (),
    negative: str | None = None,
    truncate: bool = False,
    init: str = "native",
    pipeline: str | None = None,
) -> Opened:
    """Open a model folder of ours or a diffusers pipeline.

    Args:
        spec: a folder that rectiflow or diffusers saved, or `owner/name` on the Hub.
        device: auto, cpu or cuda.
        prompt: texts for a model that takes prompts.
        negative: a text to guide away from.
        truncate: cut texts that are longer than a tokenizer takes.
        init: how a diffusion network of a pipeline is read, see `from_pipeline`.
        pipeline: where VAE and text encoders of a trained model are, if not where they were.

    Raises:
        ValueError: an unknown class of pipeline; prompts, an init or a pipeline for a model that
            takes none; prompts that are too long; a negative one without others.
        FileNotFoundError: nothing of that name.
    """
    import torch

    from rectiflow.flows import FlowModel

    place = choose_device(device)
    if is_pipeline(spec):
        from rectiflow.interop.diffusers import from_pipeline

        if pipeline is not None:
            raise ValueError(f"{spec} is a pipeline itself: leave out --pipeline")
        pipe = read_pipeline(spec).to(place)
        opened = Opened(from_pipeline(pipe, init=init).to(place), place, spec)
        opened.model.lineage[0]["source"] = spec
        opened.pipe = pipe
    else:
        model = FlowModel.from_pretrained(spec).to(place)
        if init != "native":
            raise ValueError(f"--init is for diffusers pipelines, and {spec} is a trained model")
        if pipeline is not None and not is_latent(model):
            raise ValueError(f"--pipeline is for models of pipelines, and {spec} makes images")
        opened = Opened(model, place, pipeline or _origin(model))
    if negative is not None and not prompt:
        raise ValueError("--negative needs a --prompt to guide toward")
    if prompt:
        texts = (*prompt, *(() if negative is None else (negative,)))
        with torch.no_grad():
            attach_prompts(opened, texts, truncate=truncate)
        opened.prompts = tuple(prompt)
        opened.negative = None if negative is None else {"prompt": len(prompt)}
    return opened


def read_pipeline(spec: str) -> Any:
    """A diffusers pipeline; its progress bars are for terminals only."""
    from rectiflow.errors import require

    require("diffusers", "diffusers", "transformers")
    import diffusers.utils.logging
    import transformers.utils.logging

    from rectiflow.interop.diffusers import open_pipeline

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    return open_pipeline(spec)


def attach_prompts(opened: Opened, prompts: Sequence[str], *, truncate: bool = False) -> Any:
    """Encode prompts and give the model their table, which is returned.

    Raises:
        ValueError: a model that takes no prompts, or prompts that are too long unless `truncate`.
    """
    if not is_latent(opened.model):
        takes = "class labels" if opened.model.conditional else "no condition"
        raise ValueError(f"prompts were given but the model takes {takes}")
    from rectiflow.interop.diffusers import check_prompts, encode_prompts, with_prompts

    if not truncate:
        check_prompts(opened.pipe, prompts)
    table = encode_prompts(opened.pipe, prompts)
    opened.model = with_prompts(opened.model, table)
    opened.prompts = tuple(prompts)
    return table


def condition_data(opened: Opened, prompts: Path | None, *, truncate: bool = False) -> Any:
    """What pairs take their conditions from: prompts of a file, labels of the data, or nothing.

    Raises:
        ValueError: prompts that are missing, empty or too long, or for a model that takes none.
    """
    if prompts is not None:
        from rectiflow.interop.diffusers import read_prompts

        return attach_prompts(opened, read_prompts(prompts), truncate=truncate)
    if is_latent(opened.model) and opened.model.conditional:
        raise ValueError("the model takes prompts: give them by --prompts FILE, one a line")
    return data_of(opened.model) if opened.model.conditional else None


def reinterpreted(opened: Opened, table: Any) -> FlowModel:
    """The network of an opened pipeline with its output read as a velocity: a start to train."""
    from rectiflow.interop.diffusers import from_pipeline, with_prompts

    model = from_pipeline(opened.pipe, init="reinterpret").to(opened.device)
    return with_prompts(model, table)


def is_latent(model: FlowModel) -> bool:
    """Whether a model makes latents of a pipeline."""
    return model.data.get("name") == "latents" and "pipeline" in model.data


def is_pipeline(spec: str) -> bool:
    """Whether a folder, or a name on the Hub, is a diffusers pipeline."""
    folder = Path(spec)
    if folder.is_dir():
        return (folder / PIPELINE).is_file()
    if folder.exists() or spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        return False
    from rectiflow.errors import require

    require("app", "huggingface_hub")
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(spec, PIPELINE)
    except Exception:
        # What it is, if not a pipeline, is for the reader of model folders to say.
        return False
    return True


def _origin(model: FlowModel) -> str | None:
    """The pipeline that a model's lineage begins with."""
    first = model.lineage[0] if model.lineage else {}
    return first.get("source") if first.get("method") == "pipeline" else None
