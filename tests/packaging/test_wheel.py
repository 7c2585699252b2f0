"""The wheel, installed somewhere else and used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (("--help",), ("list",), ("demo", "--preset", "quick"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    target = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", target, source], source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel alone; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", folder]
    run([sys.executable, "-m", "pip", "install", *options, wheel], folder)
    return folder


def run(command: list[object], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rectiflow"}
    assert {"rectiflow/py.typed", "rectiflow/recipes/catalog.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_import_is_the_installed_one(site: Path, tmp_path: Path) -> None:
    code = "import rectiflow; print(rectiflow.__file__); print(rectiflow.FlowModel.__name__)"
    file, name = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).split()
    assert Path(file).is_relative_to(site)
    assert name == "FlowModel"


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_run_from_the_wheel(
    arguments: tuple[str, ...], site: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rectiflow", *arguments]
    assert run(command, tmp_path, PYTHONPATH=str(site))
