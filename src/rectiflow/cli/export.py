"""`rectiflow export`: write a sampler as ONNX or torch.export program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.settings import parse
from rectiflow.errors import positive


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow export`."""

    model: tyro.conf.Positional[str]
    """Model folder, or owner/name on the Hub."""
    out: Path
    """File to write: .onnx or .pt2 (torch.export)."""
    steps: int | None = None
    """Solver steps, fixed in the file; what the model was made for by default."""
    solver: Literal["euler", "heun", "midpoint", "rk4"] | None = None
    """Fixed-step solver; the model's own by default."""
    overwrite: bool = False
    """Write over --out."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            positive("steps", self.steps)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="export", summary=COMMANDS["export"].summary)
    from rectiflow.flows import FlowModel
    from rectiflow.interop.export import export_sampler

    if settings.out.exists() and not settings.overwrite:
        raise FileExistsError(f"{settings.out} exists: choose another --out or pass --overwrite")
    model = FlowModel.from_pretrained(settings.model)
    difference = export_sampler(model, settings.out, steps=settings.steps, solver=settings.solver)
    size = settings.out.stat().st_size / 1e6
    print(f"{settings.out} ({size:.1f} MB); largest difference to the model: {difference:.1e}")
    return 0
