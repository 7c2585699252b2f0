"""How long do `import rectiflow`, its torch names, and the commands that only print take?

Seconds depend on the machine, so each target is also given in units of what the same machine takes
for the bare import: its seconds were set where Python started in 0.05 s and torch in 1.8 s.
"""

from __future__ import annotations

import json
import subprocess
import sys

import harness
from harness import Clocks, Rounds, Timer

PYTHON, TORCH = "bare python", "import torch"
# Both imports in one process, so that the noise of the first is not in the second.
INSIDE = """
import json, time
def clocks():
    return time.process_time(), time.perf_counter()
begin = clocks()
{first}
middle = clocks()
{second}
end = clocks()
print(json.dumps([[b - a for a, b in zip(begin, middle)], [b - a for a, b in zip(middle, end)]]))
"""


def after(first: str, second: str) -> tuple[Clocks, Clocks]:
    """What two statements take, one after the other in a fresh process."""
    code = INSIDE.format(first=first, second=second)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    one, two = json.loads(out.stdout)
    return (one[0], one[1]), (two[0], two[1])


def names_over_torch(statements: dict[str, str], rounds: int) -> Rounds:
    """Seconds of imports in processes that had imported torch, and of that import."""
    seconds: dict[str, list[Clocks]] = {name: [] for name in (TORCH, *statements)}
    for _ in range(rounds):
        for name, statement in statements.items():
            torch, own = after("import torch", statement)
            seconds[name].append(own)
        seconds[TORCH].append(torch)
    return Rounds(seconds)


def main() -> bool:
    plain: dict[str, Timer] = {
        PYTHON: harness.child("-c", "pass"),
        "import rectiflow": harness.child("-c", "import rectiflow"),
        "rectiflow --help": harness.child("-m", "rectiflow", "--help"),
        "rectiflow list": harness.child("-m", "rectiflow", "list"),
    }
    for timer in plain.values():
        timer()  # byte code and the file cache
    light = harness.measure(plain, floor=PYTHON, rounds=25)
    names = {
        "integrate": "from rectiflow.flows import integrate",
        "FlowModel": "from rectiflow import FlowModel",
    }
    names_over_torch(names, 1)
    heavy = names_over_torch(names, 9)
    rows = []
    for case, name, seconds, clock in (
        ("package", "import rectiflow", 0.05, "cpu"),
        ("command", "rectiflow --help", 0.15, "wall"),
        ("command", "rectiflow list", 0.15, "wall"),
    ):
        rows.append(harness.over(case, light, name, PYTHON, target=seconds, clock=clock))
        relative = 1 + seconds / 0.05
        rows.append(harness.ratio(case, light, name, PYTHON, target=relative, clock=clock))
    for name in names:
        rows.append(harness.alone("names", heavy, name, target=0.10, note="after import torch"))
        rows.append(harness.ratio("names", heavy, name, TORCH, target=0.10 / 1.8))
    return harness.report("import_time", __doc__ or "", rows)


if __name__ == "__main__":
    harness.finish(main)
