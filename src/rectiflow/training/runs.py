"""Run folders: where a command writes, what it was told, what it ran on, which papers it used."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from rectiflow import __version__
from rectiflow.errors import RunExistsError
from rectiflow.files import read_json, write_json
from rectiflow.training.acceleration import flat

RECORD = "run.json"
MODEL = "model"
"""The folder in which a run leaves its model."""
PIPELINE = "model_index.json"
"""The file by which a folder is a diffusers pipeline."""
FREE = frozenset(
    (
        # What a run shows, keeps and runs on.
        *("out", "resume", "overwrite", "device", "tracker", "log_every", "checkpoint_every"),
        *("keep", "compile", "diagnose", "diagnose_every", "keep_adapters", "export_pipeline"),
        *("report", "pictures", "samples"),
        # The trainer compares batches over all processes.
        *("batch_size", "accumulate"),
    )
)
"""Settings that may differ when a run goes on."""
LENGTHS = ("steps", "iters")
"""Settings that may differ as long as it is not done."""


class Run:
    """A folder that holds everything one command made.

    `run.json` says the command, its resolved settings, the environment, the systems used (for
    `rectiflow cite`), and how it ended.

    Args:
        folder: the folder; it must be new or empty, or hold only the record of a run that failed
            before it wrote anything, unless `resume` or `overwrite` is set.
        command: what is run.
        settings: the resolved settings: a dataclass or a table of plain values.
        resume: go on in a folder of the same command and settings.
        overwrite: start anew in a folder that holds a run; a training removes the model and the
            checkpoints that it finds, other files stay until rewritten.

    Raises:
        RunExistsError: the folder is in use and neither flag is set.
        ValueError: `resume` in a folder of another command, with other settings, or of a run that
            is done with another number of steps.
    """

    def __init__(
        self,
        folder: Path | str,
        command: str,
        settings: Any = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.command = Path(folder), command
        self.main = is_main_process()
        self._began = time.monotonic()
        record = self.folder / RECORD
        before = read_json(record) if record.is_file() else None
        if self.folder.exists() and not self.folder.is_dir():
            raise RunExistsError(f"{self.folder} is a file: choose another --out")
        taken = self.folder.is_dir() and any(p.name != RECORD for p in self.folder.iterdir())
        taken = taken or (before is not None and before["status"] != "failed")
        if self.main and taken and not (resume or overwrite):
            raise RunExistsError(
                f"{self.folder} is not empty: choose another --out, continue it with --resume, or "
                "write over it with --overwrite"
            )
        if resume and before is not None and before["command"] != command:
            raise ValueError(
                f"{self.folder} is a run of {before['command']!r}, not of {command!r}: nothing to "
                "resume"
            )
        self.resumed = bool(resume and before is not None)
        chosen = plain(settings)
        if self.resumed and before:
            self._check_resumed(before, chosen)
        self._record = {
            "command": command,
            "status": "running",
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "settings": chosen,
            "environment": environment(),
            "systems": before["systems"] if self.resumed and before else [],
        }
        self._write()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if kind is None:
            self._end("done")
        elif issubclass(kind, KeyboardInterrupt):
            self._end("interrupted")
        else:
            self._end("failed", reason=f"{kind.__name__}: {error}")

    def _check_resumed(self, before: dict[str, Any], chosen: Any) -> None:
        """Refuse to go on with other settings than the run was begun with."""
        own, new = (flat(one or {}) for one in (before["settings"], chosen))
        for name in (name for name in own if name in new and name not in {*FREE, *LENGTHS}):
            if not _same(own[name], new[name]):
                raise ValueError(
                    f"cannot resume {self.folder}: --{name.replace('_', '-')} was {own[name]}, now "
                    f"{new[name]}; use the settings of the first run or start a new one"
                )
        done = before["status"] == "done" or self.path(MODEL).is_dir()
        for name in LENGTHS:
            if done and own.get(name) != new.get(name):
                raise ValueError(
                    f"{self.folder} is done, with --{name} {own.get(name)}: for {new.get(name)} "
                    "start a new run"
                )

    def path(self, name: str) -> Path:
        """A path in the folder."""
        return self.folder / name

    def used(self, *slugs: str) -> None:
        """Note which systems (slugs of the catalog) the run really used."""
        self._record["systems"] = sorted({*self._record["systems"], *slugs})
        self._write()

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` holds."""
        return self._record

    def _end(self, status: str, **more: Any) -> None:
        seconds = round(time.monotonic() - self._began, 2)
        self._record.update(status=status, seconds=seconds, **more)
        self._write()

    def _write(self) -> None:
        if self.main:
            write_json(self.folder / RECORD, self._record)


def is_main_process() -> bool:
    """Whether this is the first (or only) process of a launch."""
    return int(os.environ.get("RANK", "0")) == 0


def new_folder(command: str, name: str = "", root: Path | str = "runs") -> Path:
    """A folder name that is free: `runs/<command>-<name>-<date>-<time>`, numbered if taken."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = "-".join(part for part in (command, name, stamp) if part)
    folder, number = Path(root) / base, 2
    while folder.exists():
        folder, number = Path(root) / f"{base}-{number}", number + 1
    return folder


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as numbers depend on them; no names of people or hosts."""
    import torch

    versions = {}
    for package in ("torch", "numpy", "safetensors", "accelerate", "scikit-learn", "scipy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "rectiflow": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def plain(value: Any) -> Any:
    """Settings as values that JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    return str(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, or names of one file or folder."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
