"""How long do `import rectiflow`, its torch names, and the commands that only print take?"""

from __future__ import annotations

import harness

PYTHON, TORCH = "bare python", "import torch"


def main() -> bool:
    plain = {
        PYTHON: harness.child("-c", "pass"),
        "import rectiflow": harness.child("-c", "import rectiflow"),
        "rectiflow --help": harness.child("-m", "rectiflow", "--help"),
        "rectiflow list": harness.child("-m", "rectiflow", "list"),
    }
    torch = {
        TORCH: harness.child("-c", "import torch"),
        "integrate": harness.child("-c", "from rectiflow.flows import integrate"),
        "FlowModel": harness.child("-c", "from rectiflow import FlowModel"),
    }
    for timer in (*plain.values(), *torch.values()):
        timer()  # byte code and the file cache
    light = harness.measure(plain, floor=PYTHON, rounds=15)
    heavy = harness.measure(torch, floor=TORCH, rounds=7)
    rows = [
        harness.over("package", light, "import rectiflow", PYTHON, target=0.05),
        harness.over("command", light, "rectiflow --help", PYTHON, target=0.15, clock="wall"),
        harness.over("command", light, "rectiflow list", PYTHON, target=0.15, clock="wall"),
        harness.over("names", heavy, "integrate", TORCH, target=0.10),
        harness.over("names", heavy, "FlowModel", TORCH, target=0.10),
    ]
    return harness.report("import_time", __doc__ or "", rows)


if __name__ == "__main__":
    harness.finish(main)
