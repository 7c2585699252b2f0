"""Kill pair generation at random moments, resume, and compare with a run left in peace.

    python tests/stress/kill_pairs.py --kills 20
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = 64


def generate(folder: str, shards: int) -> None:
    """One run over small shards: a kill is as likely in writing as in computing."""
    import torch

    from rectiflow.distill import generate_pairs
    from rectiflow.flows import FlowModel

    model = FlowModel(lambda x, t: torch.tanh(x) * t[:, None], shape=(64,))
    generate_pairs(model, folder, shards * ROWS - 7, steps=20, shard_size=ROWS, batch_size=32)


def stress(folder: Path | str, *, kills: int, shards: int, seed: int) -> int:
    """Kill `kills` runs, finish, compare; returns how many were killed at work."""
    folder, chance = Path(folder), random.Random(seed)
    generate(str(folder / "whole"), shards)
    killed = 0
    while killed < kills:
        begun = _shards(folder / "part")
        if begun == shards:
            raise AssertionError(f"all shards were made after {killed} kills: ask for more shards")
        command = [sys.executable, __file__, "--generate", str(folder / "part")]
        process = subprocess.Popen([*command, "--shards", str(shards)])
        # The start of Python takes seconds: the clock runs from the first shard of this run.
        while process.poll() is None and _shards(folder / "part") == begun:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    generate(str(folder / "part"), shards)
    names = sorted(os.listdir(folder / "whole"))
    assert sorted(os.listdir(folder / "part")) == names, "files left over or missing"
    for name in names:
        whole, part = ((folder / side / name).read_bytes() for side in ("whole", "part"))
        assert whole == part, f"{name} differs"
    return killed


def _shards(folder: Path) -> int:
    return len(list(folder.glob("pairs-*.safetensors")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", help="make pairs in this folder (what is killed)")
    options = parser.parse_args()
    if options.generate:
        generate(options.generate, options.shards)
        return
    with tempfile.TemporaryDirectory() as folder:
        killed = stress(folder, kills=options.kills, shards=options.shards, seed=options.seed)
    print(f"{killed} kills, {options.shards} shards: every byte as without")


if __name__ == "__main__":
    main()
