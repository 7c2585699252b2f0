"""The README says what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rectiflow.cli import main
from rectiflow.cli.commands import COMMANDS

README = Path(__file__).resolve().parents[2] / "README.md"


def test_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \| (.+) \|$", README.read_text(), flags=re.MULTILINE)
    assert rows == [(name, command.summary) for name, command in COMMANDS.items()]


def test_ten_lines_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.+?)^```$", README.read_text(), flags=re.M | re.S)
    assert len(code.splitlines()) <= 12
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    exec(code, found)
    points, data = found["points"], found["data"]
    assert points.shape == (1000, 2)
    # Far from the noise it starts from, and as close to the data as 500 steps bring it.
    assert torch.allclose(points.T.cov(), data.T.cov(), atol=1.0)
    # Its samples are no pictures, and the command line says so before it draws them.
    assert main(["sample", "my-flow"]) == 2
    assert "samples have shape (2,): a model of images is needed" in capsys.readouterr().err
    assert main(["sample", "my-flow", "--count", "3", "--steps", "2", "--out", "a.npy"]) == 0


def test_pictures_and_pages_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
