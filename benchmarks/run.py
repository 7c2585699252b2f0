"""Run benchmarks, each in a process of its own: `python benchmarks/run.py [NAME...]`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in {"harness", "nets", "run"})


def main(wanted: list[str]) -> int:
    unknown = sorted(set(wanted) - set(NAMES))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    outcomes = {0: "all targets met", 3: "a target was missed", 4: "machine too busy, no result"}
    codes = {}
    for name in wanted or NAMES:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        command = [sys.executable, str(HERE / f"{name}.py")]
        codes[name] = subprocess.run(command, env=environment).returncode
    print()
    for name, code in codes.items():
        print(f"{name}: {outcomes.get(code, 'failed')}")
    return max(codes.values())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
