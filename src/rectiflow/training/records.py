"""The log of a training: one JSON object a line, cut back when training resumes earlier."""

from __future__ import annotations

import json
from pathlib import Path

from rectiflow.files import write_text


class MetricsLog:
    """Appends numbers of a step to a JSON-lines file.

    Args:
        path: the file; None writes nothing.
        step: the step that training starts from; later lines of an interrupted run are dropped.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self.path = path
        if path is not None:
            kept = [row for row in read_log(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add a line."""
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **numbers}) + "\n")


def read_log(path: Path | str) -> list[dict[str, float]]:
    """The lines of a log; a last line cut off by a crash is left out.

    Example:
        >>> read_log("no/such/file")
        []
    """
    path = Path(path)
    rows: list[dict[str, float]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
