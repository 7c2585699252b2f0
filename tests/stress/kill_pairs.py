"""Kill pair generation at random moments, resume, and compare with a run left in peace.

python tests/stress/kill_pairs.py --kills 20
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.process
import os
import random
import signal
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


def stress(folder: Path, *, kills: int, shards: int, seed: int) -> int:
    """Kill `kills` runs, finish, compare; returns how many were killed at work."""
    # Runs are forked from a server that has imported torch once; a fork of a process that has
    # computed with threads could hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rectiflow.distill.generation"])

    def begin(name: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=generate, args=(str(folder / name), shards))
        process.start()
        return process

    def finish(name: str) -> None:
        process = begin(name)
        process.join()
        assert process.exitcode == 0, f"generating {name} ended with {process.exitcode}"

    chance, killed = random.Random(seed), 0
    finish("whole")
    while killed < kills:
        made = _shards(folder / "part")
        if made == shards:
            raise AssertionError(f"all shards were made after {killed} kills: ask for more shards")
        process = begin("part")
        # The moment is random from the first new shard on; before it nothing is at stake.
        while process.is_alive() and _shards(folder / "part") == made:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    finish("part")
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        killed = stress(folder, kills=options.kills, shards=options.shards, seed=options.seed)
    print(f"{killed} kills, {options.shards} shards: every byte as without")


if __name__ == "__main__":
    main()
