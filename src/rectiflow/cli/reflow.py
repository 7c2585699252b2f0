"""`rectiflow reflow`: straighten a flow on its own pairs."""

from __future__ import annotations

from collections.abc import Sequence

from rectiflow.cli.students import run, settings_for

Settings = settings_for("reflow")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    return run(Settings, words)
