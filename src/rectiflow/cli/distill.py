"""`rectiflow distill`: distil a straightened flow to one or few steps."""

from __future__ import annotations

from collections.abc import Sequence

from rectiflow.cli.students import run, settings_for

Settings = settings_for("distill")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    return run(Settings, words)
