"""`rectiflow info`: what a model folder is and how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from rectiflow.cli.commands import COMMANDS
from rectiflow.cli.models import open_model
from rectiflow.cli.settings import parse


@dataclass(frozen=True)
class Settings:
    """Settings of `rectiflow info`."""

    model: tyro.conf.Positional[str]
    """Model folder, diffusers pipeline folder, or owner/name on the Hub."""
    json: bool = False
    """Print JSON."""


def main(words: Sequence[str]) -> int:
    """Run the command."""
    settings = parse(Settings, words, command="info", summary=COMMANDS["info"].summary)
    from rectiflow.flows.artifact import identity

    model = open_model(settings.model, device="cpu").model
    facts = {
        "model": settings.model,
        "identity": identity(model),
        "network": getattr(model.net, "name", type(model.net).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "path": model.path.config(),
        "prediction": model.prediction,
        "shape": list(model.shape) if model.shape else None,
        "sampling": model.sampling,
        "data": model.data,
        "lineage": model.lineage,
    }
    if settings.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name in ("model", "identity", "network", "prediction", "shape"):
        print(f"{name:<12}{facts[name]}")
    print(f"{'parameters':<12}{facts['parameters']:,}")
    for name in ("path", "sampling", "data"):
        print(f"{name:<12}{_inline(facts[name])}")
    print("lineage" if model.lineage else "lineage     none recorded")
    for number, entry in enumerate(model.lineage, 1):
        details = {k: v for k, v in entry.items() if k != "method"}
        print(f"  {number}. {entry.get('method', 'step')}: {_inline(details)}")
    return 0


def _inline(table: object) -> str:
    assert isinstance(table, dict)
    return ", ".join(f"{k} {v}" for k, v in table.items() if v not in (None, [], {})) or "–"
