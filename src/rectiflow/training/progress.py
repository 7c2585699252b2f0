"""Progress: a bar on a terminal, plain lines elsewhere, nothing for what ends in two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

PATIENCE = 2.0
"""Seconds before anything is shown."""


class Bar:
    """Counts what is done; shows count, numbers, speed and remaining time."""

    def __init__(self, title: str, total: int, unit: str, *, start: int, shown: bool) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = start
        self._began = time.monotonic()
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._next = self._began + PATIENCE
        self._rich: Any = None
        self._task: Any = None

    def update(self, done: int, **numbers: float) -> None:
        """Say how much is done, with numbers such as `loss=0.1`. Cheap to call often."""
        self.done = done
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + (0.1 if self._terminal else 10.0)
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._terminal:
            self._draw(text)
        else:
            speed = (done - self._first) / max(now - self._began, 1e-9)
            left = (self.total - done) / speed if speed else float("inf")
            print(
                f"{self.title}: {done}/{self.total}  {text}  {speed:.3g} {self.unit}/s  "
                f"{clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _draw(self, text: str) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("/"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._rich.start()
            self._task = self._rich.add_task(
                self.title, total=self.total, completed=self.done, numbers="", speed=""
            )
        elapsed = max(time.monotonic() - self._began, 1e-9)
        speed = f"{(self.done - self._first) / elapsed:.3g} {self.unit}/s"
        self._rich.update(self._task, completed=self.done, numbers=text, speed=speed)

    def close(self) -> None:
        """Take the bar away, or print the closing line of a long job."""
        seconds = time.monotonic() - self._began
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done)
            self._rich.stop()
        elif self._shown and seconds > PATIENCE:
            print(
                f"{self.title}: {self.done}/{self.total} in {clock(seconds)}",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def bar(
    title: str, total: int, *, unit: str = "steps", start: int = 0, shown: bool = True
) -> Iterator[Bar]:
    """A progress bar for the block.

    Args:
        title: what is going on.
        total: how much there is to do.
        unit: what is counted.
        start: how much was done before, as after a resume.
        shown: False shows nothing (all processes but the first).
    """
    made = Bar(title, total, unit, start=start, shown=shown)
    try:
        yield made
    finally:
        made.close()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    Example:
        >>> clock(75), clock(3675)
        ('1:15', '1:01:15')
    """
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Stopwatch:
    """Seconds spent in a block, kept in `seconds`."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._began = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._began
