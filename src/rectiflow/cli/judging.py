"""What models are judged by: images, features, and prompts for those that take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.cli.models import Opened, attach_prompts, is_latent, open_model
from rectiflow.cli.options import data_of, load_data
from rectiflow.cli.pictures import picture_shape
from rectiflow.errors import positive
from rectiflow.files import cache_folder

if TYPE_CHECKING:
    from rectiflow.training.data import ImageData
    from rectiflow.training.evaluation import Evaluator

DRAWN = 1234
"""Seed of the captions that samples are asked for."""


@dataclass(frozen=True)
class JudgeOptions:
    """Which models are judged, and by what."""

    data: str | None = None
    """Data to judge by; what the model was trained on by default. Models of latents need some, of
    images as large as theirs."""
    samples: int = 5000
    """Samples for each score."""
    features: str = "auto"
    """auto, random, or inception:PATH (local weights) for FID."""
    prompts: Path | None = None
    """Prompts to sample by, one a line, in turn; the captions of --data by default."""
    truncate: bool = False
    """Cut prompts and captions that are longer than a tokenizer takes."""
    pipeline: str | None = None
    """Pipeline with VAE and text encoders of trained models of latents; the one each was made from
    by default."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def check_scores(self, steps: Sequence[int]) -> None:
        """Refuse counts of samples and steps that cannot be scored."""
        positive("samples", self.samples)
        for count in steps:
            positive("steps", count)
        if not steps:
            raise ValueError("--steps needs at least one number")

    def open(self, spec: str) -> Opened:
        """A model folder or a pipeline, on its device."""
        return open_model(spec, device=self.device, pipeline=self.pipeline)

    def judging_data(self, opened: Opened) -> tuple[ImageData, ImageData]:
        """The training and test set to score a model by.

        Raises:
            ValueError: no data for a model of latents, or one whose images are not square.
        """
        model = opened.model
        if self.data is None:
            if is_latent(model):
                raise ValueError(
                    "a model of latents does not say what images to judge it by: name some by "
                    "--data"
                )
            return data_of(model), data_of(model, "test")
        channels, size = None, None
        if model.shape:
            channels, height, size = picture_shape(opened)
            if is_latent(model) and height != size:
                raise ValueError(
                    f"images of data sets are square, and the model makes {height}x{size}"
                )
        train = load_data(self.data, size=size, channels=channels)
        return train, load_data(self.data, split="test", size=size, channels=channels)

    def attach(self, models: Sequence[Opened]) -> int:
        """Give models that take prompts the same prompts; how many, 0 for models without.

        Raises:
            ValueError: prompts for models that take none, or none for those that do.
        """
        takes = [is_latent(one.model) and one.model.conditional for one in models]
        if not any(takes):
            if self.prompts is not None:
                raise ValueError("--prompts was given, and the model takes none")
            return 0
        texts = self._texts(models[0])
        known: dict[str | None, Any] = {}
        for one in models:
            # Models of one pipeline share what stands around them.
            if one.source in known:
                one.pipe = known[one.source]
            known[one.source] = one.pipe
            attach_prompts(one, texts, truncate=self.truncate)
        return len(texts)

    def evaluator(self, models: Sequence[Opened]) -> Evaluator:
        """The evaluator of models that make the same kind of images; attaches their prompts.

        Raises:
            ValueError: data or prompts that are missing or do not belong to the models.
        """
        import torch

        from rectiflow.training.evaluation import Evaluator

        first = models[0]
        train, test = self.judging_data(first)
        prompts = self.attach(models)
        return Evaluator(
            train,
            test,
            count=self.samples,
            features=self.features,
            cache=cache_folder(),
            decode=first.images if is_latent(first.model) else None,
            condition=(lambda rows: {"prompt": torch.arange(len(rows)) % prompts})
            if prompts
            else None,
        )

    def _texts(self, opened: Opened) -> tuple[str, ...]:
        """The prompts of the file, or captions of as many images as there are samples."""
        import torch

        if self.prompts is not None:
            from rectiflow.interop.diffusers import read_prompts

            return tuple(read_prompts(self.prompts))
        data = self.judging_data(opened)[0]
        if data.captions is None:
            raise ValueError(
                f"the model takes prompts and {data.name} has no captions: give --prompts FILE, "
                "one a line"
            )
        generator = torch.Generator().manual_seed(DRAWN)
        rows = torch.randperm(len(data), generator=generator)[: self.samples]
        return tuple(data.captions[row] for row in rows.tolist())
