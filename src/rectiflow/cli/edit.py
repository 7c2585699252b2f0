"""`rectiflow edit`: change what real images show, by inversion or in a region of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.inversion import InversionOptions, conditions, distances, finite, grid_of
from rectiflow.cli.options import counting
from rectiflow.cli.settings import parse
from rectiflow.errors import positive

if TYPE_CHECKING:
    from torch import Tensor

    from rectiflow.cli.models import Opened


@dataclass(frozen=True)
class Settings(InversionOptions):
    """Settings of `rectiflow edit`."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """Model folder of rectiflow (an mmdit) or diffusers (SD3, FLUX), or owner/name on the Hub."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Pictures, or .npy arrays of images."""
    label: tuple[int, ...] = ()
    """The class of the images, then one or more wanted classes."""
    prompt: tuple[str, ...] = ()
    """The text that describes the images, then one or more wanted texts."""
    inject: int = 3
    """Steps whose attention values come from the images; more keep more, 0 for none."""
    guidance: float = 2.0
    """Scale toward the wanted class or text."""
    blocks: str | None = None
    """Regular expression for the attentions; the later half of the blocks by default."""
    bank: Literal["device", "cpu"] = "device"
    """Where attention values are kept."""
    mask: Path | None = None
    """Picture of the image's size, white where the image is kept: the rest is made anew from noise,
    without inversion."""
    source_steps: int | None = None
    """Steps of --mask in which the whole picture is pulled to the image; by default 10, but at most
    half of those that are steered."""
    step_size: float = 0.05
    """With --mask: step of the pull, see rectiflow inverse."""
    seed: int = 0
    """With --mask: seed of the noises."""
    steps: int = 0
    """Solver steps; 0 for the usual 15 each way, or 50 with --mask."""
    solver: str = "auto"
    """auto (rf-solver, or euler with --mask), or one of those of rectiflow invert."""
    out: Path = Path("edited.png")
    """The picture, a .png; the numbers go beside it as .json."""

    def __post_init__(self) -> None:
        masked = self.mask is not None
        if self.steps == 0:
            object.__setattr__(self, "steps", 50 if masked else 15)
        if self.solver == "auto":
            object.__setattr__(self, "solver", "euler" if masked else "rf-solver")
        self.check_inversion()
        positive("guidance", self.guidance, zero=True)
        positive("step_size", self.step_size)
        if self.source_steps is not None:
            positive("source_steps", self.source_steps, zero=True)
        if masked and self.guidance < 1:
            raise ValueError(f"guidance must be >= 1 with --mask, got {self.guidance}")
        if math.isinf(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not masked and not 0 <= self.inject <= self.steps:
            raise ValueError(f"inject must be from 0 to the {self.steps} steps, got {self.inject}")
        for name in ("label", "prompt"):
            if len(getattr(self, name)) == 1:
                raise ValueError(f"--{name} needs what the images show and what is wanted, got one")

    @property
    def wanted(self) -> tuple[Any, ...]:
        """The wanted classes or texts."""
        return (self.label or self.prompt)[1:]


@dataclass(frozen=True)
class Sheet:
    """What was made of the images.

    Attributes:
        columns: titles of the columns after the image.
        images: one row an image: itself, then the columns, `(n, columns, c, h, w)`.
        record: numbers for the JSON.
        summary: a few words for the last line.
    """

    columns: list[Any]
    images: Tensor
    record: dict[str, Any]
    summary: str


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="edit", summary=COMMANDS["edit"].summary)
    picture, table = settings.claim(".png", ".json")
    if not settings.label and not settings.prompt:
        raise ValueError("say what the images show and what is wanted: --label or --prompt")
    from rectiflow.cli.models import open_model
    from rectiflow.cli.pictures import picture_shape, read_images
    from rectiflow.files import write_json
    from rectiflow.training.figures import save_images
    from rectiflow.training.runs import plain

    opened = open_model(settings.model, device=settings.device, pipeline=settings.pipeline)
    images = read_images(settings.images, picture_shape(opened), fit=settings.fit)
    condition = conditions(opened, settings.label, settings.prompt, truncate=settings.truncate)
    times = grid_of(opened, settings.steps)
    edit = _inverted if settings.mask is None else _regional
    sheet = edit(settings, opened, images, condition, times)
    save_images(sheet.images.flatten(0, 1), picture, columns=sheet.images.shape[1])
    wanted = settings.wanted
    first = sheet.images.shape[1] - len(wanted)
    write_json(
        table,
        {
            "settings": plain(asdict(settings)),
            "times": times,
            "columns": ["image", *sheet.columns],
            "distance": [
                distances(sheet.images[:, 0], sheet.images[:, first + place])
                for place in range(len(wanted))
            ],
            **sheet.record,
        },
    )
    print(f"{len(images)} images, {len(wanted)} edits each, {sheet.summary}: {picture}, {table}")
    return 0


def _inverted(
    settings: Settings,
    opened: Opened,
    images: Tensor,
    condition: Callable[[Sequence[int], int], dict[str, Any]],
    times: list[float],
) -> Sheet:
    """Edits from the noises of the images, with their attention values."""
    import torch

    from rectiflow.images import FeatureBank, RFEdit, decode

    count = len(settings.wanted)
    batches = images.split(settings.batch_size)
    steps = len(times) - 1
    edit = RFEdit(
        opened.model,
        steps=times,
        inject=settings.inject,
        guidance=settings.guidance,
        solver=settings.solver,
        select=settings.blocks,
        where=settings.bank,
    )
    rows, errors, size = [], [], 0
    with counting("edit", 2 * steps * len(batches), "steps") as update:
        for index, batch in enumerate(batches):
            base = 2 * steps * index
            x, given = opened.latents(batch.to(opened.device)), condition((0,), len(batch))
            found = edit(
                x,
                source=given,
                target=condition(range(1, count + 1), len(batch)),
                progress=lambda done, base=base: update(base + done),
            )
            back = decode(opened.model, found.noise, steps=times, solver=settings.solver, **given)
            errors += (back - x).float().square().flatten(1).mean(1).sqrt().tolist()
            made = finite(opened.images(found.images), "edit")
            shown = finite(opened.images(back), "reconstruction")
            made = made.unflatten(0, (len(batch), count))
            rows.append(torch.cat([batch[:, None], shown[:, None], made], 1))
            size = max(size, found.bytes)
    sheet = torch.cat(rows)
    blocks = FeatureBank(edit.model, select=edit.select).names if edit.inject else ()
    return Sheet(
        ["reconstruction", *settings.wanted],
        sheet,
        {
            "round_trip_error": [round(error, 6) for error in errors],
            "image_error": distances(sheet[:, 0], sheet[:, 1]),
            "bank_bytes": size,
            "blocks": list(blocks),
        },
        f"round-trip error at most {max(errors):.3g}, {size / 2**20:.3g} MiB of attention values",
    )


def _regional(
    settings: Settings,
    opened: Opened,
    images: Tensor,
    condition: Callable[[Sequence[int], int], dict[str, Any]],
    times: list[float],
) -> Sheet:
    """Edits from fresh noise in what a mask does not keep."""
    import torch

    from rectiflow.flows.sampling import draw_source
    from rectiflow.guidance import edit_region, latent_mask
    from rectiflow.images.degradations import Mask, read_mask

    assert settings.mask is not None
    operator = Mask(read_mask(settings.mask))
    operator.shape(tuple(images.shape[1:]))
    keep = operator.keep
    if opened.pipe is not None:
        assert opened.model.shape is not None
        keep = latent_mask(keep[0], opened.model.shape[1:])
    generator = torch.Generator().manual_seed(settings.seed)
    noise = draw_source(opened.model, len(images), generator=generator)
    batches = list(zip(images.split(settings.batch_size), noise.split(settings.batch_size)))
    steps, done, rows = len(times) - 1, 0, []
    with counting("edit", steps * len(batches) * len(settings.wanted), "steps") as update:
        for batch, start in batches:
            x, made = opened.latents(batch.to(opened.device)), []
            for place in range(1, len(settings.wanted) + 1):
                found = edit_region(
                    opened.model,
                    x,
                    keep.to(opened.device),
                    condition=condition((place,), len(batch)),
                    source=condition((0,), len(batch)),
                    scale=settings.guidance - 1,
                    source_steps=settings.source_steps,
                    steps=times,
                    solver=settings.solver,
                    step_size=settings.step_size,
                    noise=start,
                    progress=lambda index, base=done: update(base + index),
                )
                done += steps
                made.append(finite(opened.images(found), "edit"))
            rows.append(torch.stack([batch, *made], 1))
    sheet = torch.cat(rows)
    kept = operator.keep.expand(sheet.shape[2:])
    gaps = ((sheet[:, 1:] - sheet[:, :1]).clamp(-2, 2) * kept).square().flatten(2).sum(2)
    errors = (gaps / kept.sum()).sqrt()
    return Sheet(
        list(settings.wanted),
        sheet,
        {"kept_error": [[round(float(e), 6) for e in row] for row in errors.T]},
        f"error where the image is kept at most {float(errors.max()):.3g}",
    )
