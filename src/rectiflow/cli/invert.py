"""`rectiflow invert`: the noises of real images, and what comes back from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.inversion import InversionOptions, conditions, distances, finite, grid_of
from rectiflow.cli.options import counting
from rectiflow.cli.settings import parse


@dataclass(frozen=True)
class Settings(InversionOptions):
    """Settings of `rectiflow invert`."""

    model: tyro.conf.Positional[str] = tyro.MISSING
    """Model folder of rectiflow or diffusers, or owner/name on the Hub."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Pictures, or .npy arrays of images."""
    label: int | None = None
    """Class of the images; none by default."""
    prompt: str | None = None
    """Text that describes the images; none by default."""

    def __post_init__(self) -> None:
        self.check_inversion()


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="invert", summary=COMMANDS["invert"].summary)
    picture, table, noises = settings.claim(".png", ".json", ".npy")
    import numpy as np
    import torch

    from rectiflow.cli.models import open_model
    from rectiflow.cli.pictures import picture_shape, read_images
    from rectiflow.files import atomic_path, write_json
    from rectiflow.flows.solvers import resolve
    from rectiflow.images import round_trip
    from rectiflow.training.figures import save_images
    from rectiflow.training.runs import plain

    resolve(settings.solver)
    opened = open_model(settings.model, device=settings.device, pipeline=settings.pipeline)
    images = read_images(settings.images, picture_shape(opened), fit=settings.fit)
    condition = conditions(
        opened,
        () if settings.label is None else (settings.label,),
        () if settings.prompt is None else (settings.prompt,),
        truncate=settings.truncate,
    )
    times, batches = grid_of(opened, settings.steps), images.split(settings.batch_size)
    made, codes, errors = [], [], []
    with counting("invert", 2 * settings.steps * len(batches), "steps") as update:
        done = 0

        def count(step: Any) -> Any:
            nonlocal done
            done += 1
            update(done)
            return step.after

        for batch in batches:
            x = opened.latents(batch.to(opened.device))
            found = round_trip(
                opened.model,
                x,
                steps=times,
                solver=settings.solver,
                correctors=(count,),
                **condition((0,), len(x)),
            )
            made.append(finite(opened.images(found.images), "reconstruction"))
            codes.append(finite(found.noise, "noise"))
            errors += found.error.tolist()
    after, noise = torch.cat(made), torch.cat(codes)
    away = distances(images, after)
    save_images(torch.stack([images, after], 1).flatten(0, 1), picture, columns=2)
    with atomic_path(noises) as temporary, open(temporary, "wb") as stream:
        np.save(stream, noise.numpy())
    write_json(
        table,
        {
            "settings": plain(asdict(settings)),
            "times": times,
            "round_trip_error": [round(error, 6) for error in errors],
            "image_error": away,
            "noise": {"mean": float(noise.mean()), "std": float(noise.std(correction=0))},
        },
    )
    worst = max(errors)
    print(
        f"{len(images)} images, round-trip error at most {worst:.3g}: {picture}, {table}, {noises}"
    )
    return 0
