"""Kill training at random moments, resume, and compare with a training left in peace.

python tests/stress/kill_training.py --kills 20
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.process
import random
import signal
import tempfile
import time
from pathlib import Path

import torch


def train(folder: str, steps: int) -> None:
    """One training that goes on from its newest checkpoint; dropout, so random states matter."""
    from rectiflow.flows import FlowModel, Independent
    from rectiflow.nets import build
    from rectiflow.training import FlowMatching, TrainerSettings
    from rectiflow.training.sessions import train_model

    torch.manual_seed(0)
    net = build("mlp", shape=(2,), width=16, depth=1, dropout=0.2, zero=False)
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(5))
    method = FlowMatching(FlowModel(net, shape=(2,)), Independent(data))
    settings = TrainerSettings(steps=steps, batch_size=16, checkpoint_every=2, log_every=1)
    train_model(method, settings, folder, entry={"method": "flow"}, resume=True)


def stress(folder: Path, *, kills: int, steps: int, seed: int) -> int:
    """Kill `kills` trainings, finish, compare; returns how many were killed at work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rectiflow.training.trainer", "accelerate"])

    def begin(name: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=train, args=(str(folder / name), steps))
        process.start()
        return process

    def finish(name: str) -> None:
        process = begin(name)
        process.join()
        assert process.exitcode == 0, f"training {name} ended with {process.exitcode}"

    chance, killed = random.Random(seed), 0
    finish("whole")
    while killed < kills:
        if (folder / "part/model").is_dir():
            raise AssertionError(f"training ended after {killed} kills: ask for more steps")
        process = begin("part")
        made = _newest(folder / "part")
        # The moment is random from the first new checkpoint on; before it nothing is at stake.
        while process.is_alive() and _newest(folder / "part") == made:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    finish("part")
    for name in ("model/model.safetensors", "metrics.jsonl"):
        whole, part = ((folder / side / name).read_bytes() for side in ("whole", "part"))
        assert whole == part, f"{name} differs"
    saved = [_state(folder / side) for side in ("whole", "part")]
    assert all(torch.equal(a, b) for a, b in zip(*saved, strict=True)), "checkpoints differ"
    return killed


def _newest(folder: Path) -> str:
    return max((p.name for p in folder.glob("checkpoints/step-*.pt")), default="")


def _state(folder: Path) -> list[torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    from rectiflow.training.checkpoints import read_newest

    state = read_newest(folder / "checkpoints")
    assert state is not None
    found: list[torch.Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])

    collect(state)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        killed = stress(folder, kills=options.kills, steps=options.steps, seed=options.seed)
    print(f"{killed} kills, {options.steps} steps: every weight as without")


if __name__ == "__main__":
    main()
