"""`rectiflow inverse`: fill in, enlarge, sharpen or colour images with a trained flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.inverse_tasks import cost_of, degradation_of, picture_of
from rectiflow.cli.models import open_model
from rectiflow.cli.options import check_folder, check_guidance, counting, data_of, guided_by
from rectiflow.cli.pictures import picture_shape, read_images
from rectiflow.cli.settings import parse
from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened
    from rectiflow.images.degradations import Degradation


@dataclass(frozen=True)
class SteeringOptions:
    """How samples are steered; see `guidance.FlowChef`."""

    step_size: float = 0.05
    """Step of steering, in parts of one over the curvature; 0.02 to 0.4, less for sharper flows."""
    inner: int = 1
    """Moves in each step."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """With adam the step size is in units of the data."""
    schedule: Literal["constant", "linear", "noise"] = "constant"
    """How the step size changes over time."""
    max_steps: int | None = None
    """Steps that are corrected, from the first; all but the last by default."""
    until: float = 1.0
    """Time (1 is data) from which steps are no longer corrected."""
    skip: bool = True
    """Skip the network's derivative; --no-skip computes it, slowly."""

    def values(self) -> dict[str, Any]:
        """The options of `FlowChef`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow inverse`."""

    model: tyro.conf.Positional[str]
    """Model folder, diffusers pipeline folder, or owner/name on the Hub."""
    task: Literal["inpaint", "sr", "deblur", "colour"] = "inpaint"
    """What was lost: a region, resolution, sharpness or colour."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """An image to degrade and restore; may be given several times. Held-out data by default."""
    measured: bool = False
    """The images are degraded already: restore them as they are."""
    mask: Path | None = None
    """Picture of the image's size: white is kept, black is filled in. A centred box by default."""
    degradation: str | None = None
    """Another degradation, such as blur:11:1.5, motion:9:30, downscale:4 or grey+downscale:2."""
    noise: float = 0.0
    """Standard deviation of the noise added to the measurement, for images in [-1, 1]."""
    fit: bool = False
    """Crop, scale and convert images to what the model takes."""
    steering: tyro.conf.OmitArgPrefixes[SteeringOptions] = SteeringOptions()
    """How samples are steered."""
    count: int = 8
    """Held-out images, where none are given."""
    steps: int = 50
    """Solver steps."""
    solver: str = "euler"
    """Any solver of rectiflow sample."""
    label: int | None = None
    """Class of a conditional model; the null class by default."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text for a model of a pipeline."""
    negative: str | None = None
    """Text to guide away from, for a model that takes prompts."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    guidance: float | str | None = None
    """Guidance toward the label or prompt: a scale, cfg:4,stop=0.8 or apg:7.5,eta=0."""
    init: str = "native"
    """How a pipeline's diffusion network is read: native, analytic or reinterpret."""
    pipeline: str | None = None
    """Pipeline with VAE and text encoders of a trained model."""
    seed: int = 0
    """Seed of the noises."""
    batch_size: int = 64
    """Images computed together."""
    out: Path = Path("inverse")
    """Folder for before-after.png, restored.npy and result.json."""
    overwrite: bool = False
    """Write over the files in --out."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "steps"):
            positive(name, getattr(self, name))
        positive("noise", self.noise, zero=True)
        check_guidance(self.guidance, negative=self.negative)
        if self.measured and not self.image:
            raise ValueError("--measured needs --image: the degraded images")
        if self.measured and self.noise:
            raise ValueError("--noise is added to what is measured here: leave out --measured")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="inverse", summary=COMMANDS["inverse"].summary)
    check_folder(settings.out, overwrite=settings.overwrite)
    import torch

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
    words_of, operator = degradation_of(
        settings.task, shape, mask=settings.mask, named=settings.degradation
    )
    generator = torch.Generator().manual_seed(settings.seed)
    truth, measured = _problem(settings, opened, operator, shape, generator)
    with counting("restore", 2 * len(measured), "images") as update:
        plain, restored = _restore(settings, opened, operator, measured, generator, update)
    record: dict[str, Any] = {
        "task": settings.task,
        "degradation": words_of,
        "noise": settings.noise,
        "steps": settings.steps,
        "solver": settings.solver,
        "guidance": settings.guidance,
        "steering": settings.steering.values(),
        "seed": settings.seed,
        "images": len(measured),
        "steered": _scores(restored, truth, measured, operator),
        "not_steered": _scores(plain, truth, measured, operator),
    }
    panels = {
        **({} if truth is None else {"image": truth}),
        "measured": picture_of(measured, shape),
        "not steered": plain,
        "steered": restored,
    }
    _write(settings.out, record, panels, restored)
    print(f"{_summary(record)}: {settings.out}")
    return 0


def _problem(
    settings: Settings,
    opened: Opened,
    operator: Degradation,
    shape: tuple[int, int, int],
    generator: Any,
) -> tuple[Tensor | None, Tensor]:
    """The true images, where they are known, and what is measured of them."""
    from rectiflow.images.degradations import measure

    if settings.measured:
        wanted = operator.shape(shape)
        return None, read_images(
            settings.image, (wanted[0], wanted[1], wanted[2]), fit=settings.fit
        )
    if settings.image:
        truth = read_images(settings.image, shape, fit=settings.fit)
    else:
        held = data_of(opened.model, "test")
        truth = held.batch(range(min(settings.count, len(held))))
    return truth, measure(operator, truth, noise=settings.noise, generator=generator)


def _restore(
    settings: Settings,
    opened: Opened,
    operator: Degradation,
    measured: Tensor,
    generator: Any,
    update: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Samples from the same noises, without and with steering, as images."""
    import torch

    from rectiflow.flows import sample
    from rectiflow.flows.sampling import condition_rows, draw_source
    from rectiflow.guidance import FlowChef

    count = len(measured)
    source = draw_source(opened.model, count, generator=generator)
    condition = opened.condition(count, settings.label, generator)
    if settings.label is None and "label" in condition:
        if settings.guidance is not None:
            raise ValueError("--guidance needs a --label to guide toward")
        condition = {**condition, **opened.model.null_condition(**condition)}
    guided = None
    if settings.guidance is not None:
        guided = guided_by(opened.model, settings.guidance, negative=opened.negative)
    found: list[list[Tensor]] = [[], []]
    done = 0
    for begin in range(0, count, settings.batch_size):
        part = slice(begin, begin + settings.batch_size)
        seen = measured[part].to(opened.device)
        for steered, images in enumerate(found):
            cost = cost_of(opened, operator, seen) if steered else None
            chef = () if cost is None else (FlowChef(cost, **settings.steering.values()),)
            samples = sample(
                opened.model,
                source=source[part],
                steps=settings.steps,
                solver=settings.solver,
                field=guided,
                correctors=chef,
                generator=generator,
                **condition_rows(condition, part, count),
            )
            with torch.no_grad():
                images.append(opened.images(samples).float().cpu())
            done += len(seen)
            update(done)
    return torch.cat(found[0]), torch.cat(found[1])


def _scores(
    images: Tensor, truth: Tensor | None, measured: Tensor, operator: Degradation
) -> dict[str, Any]:
    """PSNR and SSIM where the truth is known, and the residual of the measurement."""
    from rectiflow.images import psnr, ssim

    residual = operator.observed(operator.A(images) - measured).flatten(1).square().mean(1).sqrt()
    found = {"residual_rms": residual}
    if truth is not None:
        found |= {"psnr_db": psnr(images, truth), "ssim": ssim(images, truth)}
    return {
        name: {"mean": float(values.mean()), "values": [float(v) for v in values]}
        for name, values in found.items()
    }


def _write(out: Path, record: dict[str, Any], panels: dict[str, Tensor], restored: Tensor) -> None:
    import numpy as np

    from rectiflow.files import files_in, write_json
    from rectiflow.training.figures import compare_samples

    with files_in(out) as folder:
        compare_samples(panels, folder / "before-after.png", title=record["degradation"])
        np.save(folder / "restored.npy", restored.clamp(-1, 1).numpy())
        write_json(folder / "result.json", record)


def _summary(record: dict[str, Any]) -> str:
    parts = [f"{record['images']} images"]
    for name, unit in (("psnr_db", "dB PSNR"), ("ssim", "SSIM"), ("residual_rms", "residual")):
        if name in record["steered"]:
            before, after = (record[arm][name]["mean"] for arm in ("not_steered", "steered"))
            parts.append(f"{unit} {before:.3g} -> {after:.3g}")
    return ", ".join(parts)
