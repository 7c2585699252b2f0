"""What importing costs: the package and the light commands must not load heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rectiflow

HEAVY = ("torch", "numpy", "tyro", "rich")
# Runs a command line in this process, whatever way it exits, then prints the heavy modules loaded.
PROBE = """
import contextlib, io, runpy, sys
sys.argv = ["rectiflow", *sys.argv[1:]]
status = 0
with contextlib.redirect_stdout(io.StringIO()):
    try:
        runpy.run_module("rectiflow", run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
print(status, *(name for name in {heavy} if name in sys.modules))
"""


def loaded(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_nothing_heavy() -> None:
    code = f"import sys, rectiflow; print(*(m for m in {HEAVY} if m in sys.modules))"
    assert loaded(code) == ""


def test_public_names_import_on_demand() -> None:
    code = "import sys, rectiflow; rectiflow.FlowModel; print('torch' in sys.modules)"
    assert loaded(code) == "True"


@pytest.mark.parametrize("argument", ["--help", "list"])
def test_light_commands_load_nothing_heavy(argument: str) -> None:
    assert loaded(PROBE.format(heavy=HEAVY), argument) == "0"


def test_no_public_name_is_hidden_by_the_file_it_comes_from() -> None:
    # Importing a file sets it as an attribute of its package, over a lazy name that is the same.
    for init in Path(rectiflow.__file__).parent.rglob("__init__.py"):
        for call in ast.walk(ast.parse(init.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "attach":
                table = ast.literal_eval(call.args[1])
                assert not table.keys() & {n for names in table.values() for n in names}, init
