"""`rectiflow sample`: generate images with a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.models import open_model
from rectiflow.cli.options import check_folder, check_guidance, counting, guided_by
from rectiflow.cli.settings import parse
from rectiflow.cli.steering import steering
from rectiflow.errors import positive


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow sample`."""

    model: tyro.conf.Positional[str]
    """Model folder, diffusers pipeline folder, or owner/name on the Hub."""
    out: Path = Path("samples.png")
    """A .png for one sheet, a .npy for the array in [-1, 1], or a folder for single images."""
    count: int = 64
    """Images."""
    steps: int | None = None
    """Solver steps; what the model was made for by default."""
    solver: str | None = None
    """euler, heun, midpoint, rk4, dopri5, sde or renoise; the model's own by default."""
    label: int | None = None
    """Class of a conditional model; random classes by default."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text for a model of a pipeline, in turn where given several times; none by default."""
    negative: str | None = None
    """Text to guide away from, for a model that takes prompts."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    init: str = "native"
    """How a pipeline's diffusion network is read: native, analytic or reinterpret."""
    pipeline: str | None = None
    """Pipeline with VAE and text encoders of a trained model; the one it was made from by
    default."""
    guidance: float | str | None = None
    """Guidance of a conditional model: the scale of classifier-free guidance, cfg:4,stop=0.8,
    apg:7.5,eta=0,momentum=-0.5,norm=15 or apg:sdxl."""
    steer: str | None = None
    """Steering: classifier:LABEL, or inpaint, sr, deblur or colour with :IMAGE to agree with;
    then ,mask=FILE, ,degradation=WORDS, ,step=0.1, ,inner=1, ,until=1."""
    seed: int = 0
    """Seed of the noises."""
    batch_size: int = 256
    """Images computed together."""
    overwrite: bool = False
    """Write over --out; of a folder, over the images in it that sample wrote."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "steps"):
            value = getattr(self, name)
            if value is not None:
                positive(name, value)
        check_guidance(self.guidance, negative=self.negative)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="sample", summary=COMMANDS["sample"].summary)
    out = settings.out
    if out.suffix not in (".png", ".npy", ""):
        raise ValueError(f"--out must be a .png, a .npy or a folder, got {out}")
    if not out.suffix:
        check_folder(out, overwrite=settings.overwrite)
    elif out.exists() and not settings.overwrite:
        raise FileExistsError(f"{out} exists: choose another --out or pass --overwrite")
    import torch

    from rectiflow.cli.pictures import picture_shape
    from rectiflow.flows import sample

    opened = open_model(
        settings.model,
        device=settings.device,
        prompt=settings.prompt,
        negative=settings.negative,
        truncate=settings.truncate,
        init=settings.init,
        pipeline=settings.pipeline,
    )
    if out.suffix != ".npy":
        picture_shape(opened)
    guided = None
    if settings.guidance is not None:
        guided = guided_by(opened.model, settings.guidance, negative=opened.negative)
    generator = torch.Generator().manual_seed(settings.seed)
    condition = opened.condition(settings.count, settings.label, generator)
    with counting("sample", settings.count, "images") as update:
        latents = sample(
            opened.model,
            settings.count,
            steps=settings.steps,
            solver=settings.solver,
            field=guided,
            correctors=() if settings.steer is None else steering(settings.steer, opened),
            batch_size=settings.batch_size,
            generator=generator,
            progress=update,
            **condition,
        )
    with torch.no_grad():
        images = opened.images(latents)
    _write(images.cpu(), out)
    print(f"{settings.count} images: {out}")
    return 0


def _write(images: object, out: Path) -> None:
    """A sheet, an array or single files."""
    import numpy as np
    import torch

    from rectiflow.files import atomic_path, files_in
    from rectiflow.training.figures import save_images, tile

    assert isinstance(images, torch.Tensor)
    if out.suffix == ".png":
        save_images(images, out)
    elif out.suffix == ".npy":
        with atomic_path(out) as temporary, open(temporary, "wb") as stream:
            np.save(stream, images.numpy())
    else:
        from PIL import Image

        with files_in(out, r"\d{6}\.png") as temporary:
            for index, image in enumerate(images):
                Image.fromarray(tile(image[None]).numpy()).save(temporary / f"{index:06d}.png")
