"""`rectiflow pairs`: generate noise-image pairs with a trained flow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.models import condition_data, open_model
from rectiflow.cli.options import check_guidance, counting, guided_by
from rectiflow.cli.settings import parse
from rectiflow.errors import positive


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow pairs`."""

    model: tyro.conf.Positional[str]
    """Model folder, diffusers pipeline folder, or owner/name on the Hub."""
    out: Path
    """Folder for the pairs; an interrupted generation in it goes on."""
    count: int = 20_000
    """Pairs."""
    solver: str = "euler"
    """euler, heun, midpoint, rk4 or dopri5."""
    steps: int = 100
    """Steps of the solver."""
    batch_size: int = 1000
    """Pairs computed together."""
    shard_size: int = 5000
    """Pairs in one file."""
    store: str = "noise"
    """noise stores the noises; seed stores only how to draw them again."""
    seed: int = 1
    """Seed of the noises."""
    guidance: float | str | None = None
    """Guidance baked into the pairs (conditional models only): the scale of classifier-free
    guidance, cfg:4,stop=0.8 or apg:7.5,eta=0,momentum=-0.5,norm=15."""
    prompts: Path | None = None
    """File of prompts, one a line, for models of pipelines; pairs take them in shuffled epochs."""
    truncate: bool = False
    """Cut prompts that are longer than a tokenizer takes."""
    init: str = "native"
    """How a pipeline's diffusion network is read: native or analytic."""
    pipeline: str | None = None
    """Pipeline with the text encoders of a trained model; the one it was made from by default."""
    check: bool = True
    """Check the quality of the pairs before generating all of them."""
    overwrite: bool = False
    """Replace pairs made with other settings."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("count", "steps", "batch_size", "shard_size"):
            positive(name, getattr(self, name))
        check_guidance(self.guidance)
        if self.init == "reinterpret":
            raise ValueError(
                "a diffusion network reinterpreted as a flow makes no images before it is trained: "
                "make pairs with --init analytic or native"
            )


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="pairs", summary=COMMANDS["pairs"].summary)
    from rectiflow.distill import PairGate, generate_pairs

    opened = open_model(
        settings.model, device=settings.device, init=settings.init, pipeline=settings.pipeline
    )
    conditions = condition_data(opened, settings.prompts, truncate=settings.truncate)
    model = opened.model
    guided = None if settings.guidance is None else guided_by(model, settings.guidance)
    with counting("pairs", settings.count, "pairs") as update:
        store = generate_pairs(
            model,
            settings.out,
            settings.count,
            solver=settings.solver,
            steps=settings.steps,
            seed=settings.seed,
            batch_size=settings.batch_size,
            shard_size=settings.shard_size,
            conditions=conditions,
            store=settings.store,
            field=guided,
            gate=PairGate() if settings.check else None,
            overwrite=settings.overwrite,
            process_index=int(os.environ.get("RANK", "0")),
            process_count=int(os.environ.get("WORLD_SIZE", "1")),
            progress=update,
        )
    print(f"pairs: {settings.out} ({len(store)})")
    return 0
