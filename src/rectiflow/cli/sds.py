"""`rectiflow sds`: paint a picture by score distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.options import (
    check_folder,
    check_guidance,
    counting,
    guided_by,
    plain_warnings,
)
from rectiflow.cli.settings import parse
from rectiflow.errors import positive
from rectiflow.training.optimizers import OptimizerSettings

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened
    from rectiflow.optim import PixelwiseClip
    from rectiflow.scenes import Painted

FROM_NOISE, FROM_IMAGES = 1000, 500
"""Steps of the paper's experiments in two dimensions."""
MAPS = 12
"""Most maps of gradients in a row of the picture."""


def _optimizer() -> OptimizerSettings:
    from rectiflow.scenes.painting import PAINTING

    return PAINTING


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow sds`."""

    model: tyro.conf.Positional[str]
    """Model folder, diffusers pipeline folder, or owner/name on the Hub."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Pictures, or .npy arrays of images, to begin with; noise by default."""
    label: int | None = None
    """The class to paint; random ones by default."""
    prompt: tuple[str, ...] = ()
    """Texts to paint, for a model of a pipeline."""
    negative: str | None = None
    """A text to guide away from."""
    guidance: float | str | None = None
    """Guidance: a scale, or cfg:4,stop=0.8; by default 101 for prompts, as in the paper, 3 for
    labels. 1 for none."""
    kind: Literal["sds", "csd"] = "sds"
    """Score distillation, or the classifier part of guidance alone."""
    weight: str = "variance"
    """Weight of a time: variance, signal-variance, inverse-variance, velocity or uniform."""
    times: tuple[float, float] | None = None
    """Range of times, 1 is data; by default 0.02 0.98, from images 0.5 0.98."""
    count: int = 4
    """Pictures, where none are given."""
    steps: int | None = None
    """Steps of the optimizer; by default 1,000 from noise, 500 from images."""
    optim: OptimizerSettings = field(default_factory=_optimizer)
    """The optimizer."""
    pixel_clip: float | str = "auto"
    """Bound on each pixel's gradient as it leaves the encoder: a number, quantile:0.95, or none;
    auto is 0.1 for models of pipelines, as in the paper, and none for others."""
    pixel_clip_norm: Literal["linf", "l2"] = "linf"
    """How long a pixel's gradient is: its largest channel, or the 2-norm."""
    suppress: str = "pixel"
    """What is done about gradients above the bound: pixel, value, global, global-norm, soft,
    pixel-soft, tanh, drop or none."""
    every: int = 10
    """Steps between looks at the gradients."""
    fit: bool = False
    """Crop, scale and convert images of another size or mode."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    init: str = "native"
    """How a pipeline's diffusion network is read: native, analytic or reinterpret."""
    pipeline: str | None = None
    """Pipeline with VAE and text encoders of a trained model."""
    seed: int = 0
    """Seed of everything."""
    out: Path = Path("painted")
    """Folder for samples.png, gradients.png, samples.npy and result.json."""
    overwrite: bool = False
    """Write over the files in --out."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("count", "every"):
            positive(name, getattr(self, name))
        if self.steps is not None:
            positive("steps", self.steps)
        check_guidance(self.guidance)
        if self.kind == "csd" and (self.guidance is not None or self.negative is not None):
            raise ValueError("--kind csd is guidance alone: leave out --guidance and --negative")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="sds", summary=COMMANDS["sds"].summary)
    check_folder(settings.out, overwrite=settings.overwrite)
    with plain_warnings():
        _paint(settings)
    return 0


def _paint(settings: Settings) -> None:
    import torch

    from rectiflow.cli.models import open_model
    from rectiflow.cli.pictures import picture_shape, read_images
    from rectiflow.scenes import ScoreDistillation, paint

    # Wrong words are said before a model is read.
    _clip(settings, latent=True)
    opened = open_model(
        settings.model,
        device=settings.device,
        prompt=settings.prompt,
        negative=settings.negative,
        truncate=settings.truncate,
        init=settings.init,
        pipeline=settings.pipeline,
    )
    shape = picture_shape(opened)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.images:
        start = read_images(settings.images, shape, fit=settings.fit)
    else:
        count = len(settings.prompt) or settings.count
        start = torch.randn(count, *shape, generator=generator).clamp_(-1, 1)
    encode = None
    clip = _clip(settings, latent=opened.pipe is not None)
    if opened.pipe is not None:
        opened.pipe.vae.requires_grad_(False)
        encode = opened.latents
    distillation = ScoreDistillation(
        opened.model,
        _field(settings, opened),
        encode,
        clip,
        settings.kind,
        settings.weight,
        settings.times or ((0.5, 0.98) if settings.images else (0.02, 0.98)),
    )
    steps = settings.steps or (FROM_IMAGES if settings.images else FROM_NOISE)
    with counting("paint", steps, "steps") as update:
        painted = paint(
            distillation,
            start.to(opened.device),
            steps=steps,
            optim=settings.optim,
            every=settings.every,
            generator=generator,
            progress=update,
            **opened.condition(len(start), settings.label, generator),
        )
    _write(settings, distillation.clip, start, painted)
    said = f", {painted.clipped[-1]:.1%} of the pixels clipped" if clip is not None else ""
    print(f"{len(start)} pictures{said}: {settings.out}")


def _clip(settings: Settings, *, latent: bool) -> PixelwiseClip | None:
    """The clip of the settings, for models of latents or of images."""
    from rectiflow.optim import PixelwiseClip

    bound: float | str = settings.pixel_clip
    if bound == "auto":
        bound = 0.1 if latent else "none"
    if bound == "none":
        return None
    return PixelwiseClip(bound, suppression=settings.suppress, norm=settings.pixel_clip_norm)


def _field(settings: Settings, opened: Opened) -> Any:
    """The model under guidance; None for as it is."""
    if settings.kind == "csd" or (settings.guidance is None and not opened.model.conditional):
        return None
    usual = 101.0 if opened.prompts else 3.0
    scale = usual if settings.guidance is None else settings.guidance
    return guided_by(opened.model, scale, negative=opened.negative)


def _write(settings: Settings, clip: PixelwiseClip | None, start: Tensor, painted: Painted) -> None:
    """Before and after, the maps of gradients, the array and the numbers."""
    import numpy as np
    import torch

    from rectiflow.files import files_in, write_json
    from rectiflow.training.figures import save_images
    from rectiflow.training.runs import plain

    images = painted.images.cpu()
    bound = clip.last if clip is not None else None
    record = {
        "settings": plain(asdict(settings)),
        "threshold": bound.threshold if bound is not None else None,
        "steps": painted.looked,
        "clipped": painted.clipped,
        "largest_before": painted.before.flatten(1).amax(1).tolist(),
        "largest_after": painted.after.flatten(1).amax(1).tolist(),
    }
    with files_in(settings.out) as folder:
        save_images(
            torch.stack([start, images], 1).flatten(0, 1), folder / "samples.png", columns=2
        )
        maps, columns = _maps(painted)
        save_images(maps, folder / "gradients.png", columns=columns)
        np.save(folder / "samples.npy", images.numpy())
        write_json(folder / "result.json", record)


def _maps(painted: Painted) -> tuple[Tensor, int]:
    """The first picture's gradients before and after the clip, a row each, over the steps.

    White is the longest gradient of a step, on a logarithmic scale of four decades.
    """
    import torch

    count = len(painted.looked)
    chosen = torch.linspace(0, count - 1, min(MAPS, count)).round().long()
    rows = [painted.before[chosen, 0], painted.after[chosen, 0]]
    largest = rows[0].flatten(1).amax(1).clamp(min=1e-30).view(-1, 1, 1)
    shown = [1 + 2 * (row / largest).clamp(min=1e-4).log10() / 4 for row in rows]
    return torch.cat(shown).unsqueeze(1), len(chosen)
