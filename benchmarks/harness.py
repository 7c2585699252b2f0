"""Ratios that survive a busy machine: interleaved rounds, CPU time, and an A/A check.

Every variant runs once in each round, so that whatever slows the machine slows all of them; a
figure is the median over the rounds of a ratio within one round. The floor runs twice in a round:
unless its ratio to itself is near one, nothing is reported.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Two clocks, CPU first: wall time also counts what other programs did meanwhile.
Clocks = tuple[float, float]
Timer = Callable[[], Clocks]
RESULTS = Path(__file__).parent / "results"
AGAIN = "again"
TRUSTED = (0.95, 1.05)


class Unquiet(RuntimeError):
    """The same code timed twice differed too much for any ratio to be trusted."""


@dataclass(frozen=True)
class Quartiles:
    """The middle half of what the rounds gave, and how well they know its middle.

    Attributes:
        median: of all rounds.
        low: a quarter of the rounds gave less.
        high: a quarter of the rounds gave more.
        error: standard error of the median, as for normal noise of this spread.
    """

    median: float
    low: float
    high: float
    error: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        # sqrt(pi / 2) sigma / sqrt(n), and quartiles of normal noise are 1.349 sigma apart.
        return cls(median, low, high, 0.929 * (high - low) / len(values) ** 0.5)


@dataclass(frozen=True)
class Rounds:
    """Seconds of every variant in every round, and the figures made of them."""

    seconds: Mapping[str, Sequence[Clocks]]

    def ratio(self, name: str, base: str, *, clock: int = 0) -> Quartiles:
        """`name` over `base`, round by round; clock 0 is CPU time and 1 wall time."""
        pairs = zip(self.seconds[name], self.seconds[base])
        return Quartiles.of([a[clock] / b[clock] for a, b in pairs])

    def over(self, name: str, base: str, *, clock: int = 0) -> Quartiles:
        """Seconds of `name` beyond `base`, round by round."""
        pairs = zip(self.seconds[name], self.seconds[base])
        return Quartiles.of([a[clock] - b[clock] for a, b in pairs])

    def typical(self, name: str, *, clock: int = 0) -> float:
        """Median seconds of one run."""
        return statistics.median(pair[clock] for pair in self.seconds[name])


def block(run: Callable[[], Any], *, shortest: float = 0.01) -> Timer:
    """A timer of one run of `run`, repeated so often that a block lasts `shortest` CPU seconds.

    Calibrating warms up: imports, caches and allocators have settled after three runs.
    """
    run(), run()
    once = clocked(run, 1)[0]
    repeats = max(1, round(shortest / max(once, 1e-7)))

    def timer() -> Clocks:
        cpu, wall = clocked(run, repeats)
        return cpu / repeats, wall / repeats

    return timer


def clocked(run: Callable[[], Any], repeats: int) -> Clocks:
    """Seconds of `repeats` runs."""
    cpu, wall = clocks()
    for _ in range(repeats):
        run()
    now = clocks()
    return now[0] - cpu, now[1] - wall


def clocks() -> Clocks:
    """The time on both clocks."""
    return time.process_time(), time.perf_counter()


def child(*command: str) -> Timer:
    """A timer of a Python process of its own: interpreter start, imports and exit included."""
    import resource

    def timer() -> Clocks:
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - wall
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return cpu, wall

    return timer


def peak_mib(*command: str) -> float:
    """The most memory, in MiB, that a Python process of its own held at once (Linux)."""
    # The kernel's account of the program itself; resource usage counts its parent before the start.
    watched = (
        "import os, re, runpy, sys; sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, os.path.dirname(sys.argv[0])); "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-1]) / 1024


def trusted(collect: Callable[[], Rounds], *, floor: str, attempts: int = 5) -> Rounds:
    """Collect rounds until the floor, timed twice in each, agrees with itself.

    Raises:
        Unquiet: the floor's ratio to itself left [0.95, 1.05] in every attempt.
    """
    for attempt in range(1, attempts + 1):
        found = collect()
        again = found.ratio(AGAIN, floor).median
        if TRUSTED[0] <= again <= TRUSTED[1]:
            return found
        print(f"attempt {attempt}: {floor} against itself gave {again:.3f}", file=sys.stderr)
    raise Unquiet(
        f"{floor} against itself stayed outside [{TRUSTED[0]}, {TRUSTED[1]}] in {attempts} "
        "attempts: run again on a quieter machine"
    )


def measure(
    timers: Mapping[str, Timer], *, floor: str, rounds: int = 21, attempts: int = 5
) -> Rounds:
    """Time all variants in interleaved rounds, the floor twice; see `trusted`.

    Garbage is collected between rounds, now and then, and never inside: a collection empties the
    caches and takes longer than most of what is timed.
    """
    order = {**timers, AGAIN: timers[floor]}

    def collect() -> Rounds:
        seconds: dict[str, list[Clocks]] = {name: [] for name in order}
        gc.disable()
        try:
            for index in range(rounds):
                if index % 20 == 0:
                    gc.collect()
                # Turning the order round keeps a drift of the machine from favouring the first.
                for name in list(order) if index % 2 else reversed(order):
                    seconds[name].append(order[name]())
        finally:
            gc.enable()
        return Rounds(seconds)

    return trusted(collect, floor=floor, attempts=attempts)


@dataclass(frozen=True)
class Row:
    """One figure and what it should at most (or at least) be.

    Attributes:
        case: what was run, such as "mlp".
        figure: what the number is, such as "ours / bare calls".
        cpu: the figure in CPU time.
        wall: the figure in wall time.
        unit: "x" for ratios, "s" for seconds.
        target: the bound, None for rows that only inform.
        clock: the clock that the target is about.
        lower_bound: the figure should be at least, not at most, the target.
        note: what else a reader needs.
    """

    case: str
    figure: str
    cpu: Quartiles
    wall: Quartiles
    unit: str = "x"
    target: float | None = None
    clock: str = "cpu"
    lower_bound: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the target."""
        if self.target is None:
            return None
        value = self._judged.median
        return value >= self.target if self.lower_bound else value <= self.target

    @property
    def unclear(self) -> bool:
        """Whether the median misses the target by less than two of its standard errors."""
        if self.target is None or self.met:
            return False
        return abs(self._judged.median - self.target) < 2 * self._judged.error

    @property
    def _judged(self) -> Quartiles:
        return self.cpu if self.clock == "cpu" else self.wall


def ratio(case: str, rounds: Rounds, name: str, base: str, **fields: Any) -> Row:
    """The row of a ratio of two variants, with the time of one run in the note."""
    per_run = f"{rounds.typical(name) * 1e3:.3g} ms against {rounds.typical(base) * 1e3:.3g} ms"
    fields["note"] = "; ".join(filter(None, (per_run, fields.get("note", ""))))
    figures = (rounds.ratio(name, base), rounds.ratio(name, base, clock=1))
    return Row(case, f"{name} / {base}", *figures, **fields)


def over(case: str, rounds: Rounds, name: str, base: str, **fields: Any) -> Row:
    """The row of the seconds that one variant takes beyond another."""
    figures = (rounds.over(name, base), rounds.over(name, base, clock=1))
    return Row(case, f"{name} - {base}", *figures, unit="s", **fields)


def alone(case: str, rounds: Rounds, name: str, **fields: Any) -> Row:
    """The row of the seconds of one variant."""
    cpu, wall = (Quartiles.of([pair[clock] for pair in rounds.seconds[name]]) for clock in (0, 1))
    return Row(case, name, cpu, wall, unit="s", **fields)


def machine(packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """What the numbers depend on, without anything that names the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((ln.split(":", 1)[1].strip() for ln in lines if "model name" in ln), model)
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or "default",
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": versions,
        "load": round(os.getloadavg()[0], 1),
        "sum_of_1000_us": round(block(lambda: sum(range(1000)))()[0] * 1e6, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def report(
    name: str, question: str, rows: Sequence[Row], *, packages: Sequence[str] = ("torch",)
) -> bool:
    """Write `results/NAME.json`, print the table, and say that no target was clearly missed."""
    described = machine(packages)
    record = {
        "name": name,
        "question": question,
        "machine": described,
        "rows": [{**asdict(row), "met": row.met, "unclear": row.unclear} for row in rows],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = RESULTS / f".{name}.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(RESULTS / f"{name}.json")
    print(f"\n{question}\n{described}\n{table(rows)}")
    return all(row.met is not False or row.unclear for row in rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, quartiles in brackets."""
    head = ("case", "figure", "cpu", "wall", "target", "met", "note")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        sign = ">=" if row.lower_bound else "<="
        target = f"{sign} {row.target:g} {row.clock}" if row.target is not None else ""
        met = "unclear" if row.unclear else {True: "yes", False: "NO", None: ""}[row.met]
        figures = (f"{q.median:.3f} [{q.low:.3f}, {q.high:.3f}]" for q in (row.cpu, row.wall))
        lines.append((f"{row.case} ({row.unit})", row.figure, *figures, target, met, row.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def one_thread() -> None:
    """Small models are fastest, and CPU time means something, on one thread."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


def available(package: str) -> bool:
    """Whether a peer is installed; says so when it is not."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        print(f"{package} is not installed, its rows are left out (pip install 'rectiflow[bench]')")
        return False
    return True


def finish(main: Callable[[], bool]) -> None:
    """Run a benchmark as a program: 0 all targets met, 3 some missed, 4 machine too busy."""
    try:
        raise SystemExit(0 if main() else 3)
    except Unquiet as error:
        print(f"no result: {error}", file=sys.stderr)
        raise SystemExit(4) from None
