"""`rectiflow edit`: change what real images show and keep how they are built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.inversion import InversionOptions, conditions, distances, finite, grid_of
from rectiflow.cli.options import counting
from rectiflow.cli.settings import parse
from rectiflow.errors import positive


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
    out: Path = Path("edited.png")
    """The picture, a .png; the numbers go beside it as .json."""

    def __post_init__(self) -> None:
        self.check_inversion()
        positive("guidance", self.guidance, zero=True)
        if math.isinf(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not 0 <= self.inject <= self.steps:
            raise ValueError(f"inject must be from 0 to the {self.steps} steps, got {self.inject}")
        for name in ("label", "prompt"):
            if len(getattr(self, name)) == 1:
                raise ValueError(f"--{name} needs what the images show and what is wanted, got one")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="edit", summary=COMMANDS["edit"].summary)
    picture, table = settings.claim(".png", ".json")
    if not settings.label and not settings.prompt:
        raise ValueError("say what the images show and what is wanted: --label or --prompt")
    import torch

    from rectiflow.cli.models import open_model
    from rectiflow.cli.pictures import picture_shape, read_images
    from rectiflow.files import write_json
    from rectiflow.images import RFEdit, decode
    from rectiflow.training.figures import save_images
    from rectiflow.training.runs import plain

    opened = open_model(settings.model, device=settings.device)
    images = read_images(settings.images, picture_shape(opened), fit=settings.fit)
    condition = conditions(opened, settings.label, settings.prompt, truncate=settings.truncate)
    count = max(len(settings.label), len(settings.prompt)) - 1
    wanted = range(1, count + 1)
    times, batches = grid_of(opened, settings.steps), images.split(settings.batch_size)
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
    with counting("edit", 2 * settings.steps * len(batches), "steps") as update:
        for index, batch in enumerate(batches):
            base = 2 * settings.steps * index
            x, given = opened.latents(batch.to(opened.device)), condition((0,), len(batch))
            found = edit(
                x,
                source=given,
                target=condition(wanted, len(batch)),
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
    save_images(sheet.flatten(0, 1), picture, columns=count + 2)
    moved = [distances(sheet[:, 0], sheet[:, place + 1]) for place in wanted]
    write_json(
        table,
        {
            "settings": plain(asdict(settings)),
            "times": times,
            "columns": ["image", "reconstruction", *(settings.label or settings.prompt)[1:]],
            "round_trip_error": [round(error, 6) for error in errors],
            "image_error": distances(sheet[:, 0], sheet[:, 1]),
            "distance": moved,
            "bank_bytes": size,
            "blocks": _names(edit),
        },
    )
    print(
        f"{len(images)} images, {count} edits each, round-trip error at most {max(errors):.3g}, "
        f"{size / 2**20:.3g} MiB of attention values: {picture}, {table}"
    )
    return 0


def _names(edit: object) -> list[str]:
    """The attentions whose values were injected."""
    from rectiflow.images import FeatureBank, RFEdit

    assert isinstance(edit, RFEdit)
    return list(FeatureBank(edit.model, select=edit.select).names) if edit.inject else []
