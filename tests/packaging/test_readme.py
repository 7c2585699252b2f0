"""The README says what there is."""

from __future__ import annotations

import re
from pathlib import Path

from rectiflow.cli.commands import COMMANDS

README = Path(__file__).resolve().parents[2] / "README.md"


def test_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \| (.+) \|$", README.read_text(), flags=re.MULTILINE)
    assert rows == [(name, command.summary) for name, command in COMMANDS.items()]


def test_pictures_and_pages_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
