"""When does a store of pairs pay: reflow from stored pairs against pairs of a live teacher?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import harness
from rectiflow.distill import Reflow, generate_pairs
from rectiflow.flows import FlowModel, LivePairs, StoredPairs
from rectiflow.nets import build, sizes
from rectiflow.training import Trainer, TrainerSettings

COUNT, STEPS = 1024, 20
STORED, LIVE, GENERATE = "step on stored pairs", "step on live pairs", "pairs of one step"
CASES = (("mlp-digits", 256), ("unet-xs", 32))


class Clocked:
    """A callback that clocks blocks of steps of a `fit`; the first block warms up."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.blocks: list[harness.Clocks] = []
        self.mark: harness.Clocks | None = None

    def __call__(self, trainer: Trainer, step: int) -> None:
        if step % self.block:
            return
        now = harness.clocks()
        if self.mark is not None:
            cpu, wall = ((b - a) / self.block for a, b in zip(self.mark, now))
            self.blocks.append((cpu, wall))
        self.mark = now


def training(model: FlowModel, coupling: object, batch: int, block: int) -> harness.Timer:
    """A timer of one step of reflow, taken over a block of a real `fit`."""

    def timer() -> harness.Clocks:
        seen = Clocked(block)
        settings = TrainerSettings(steps=2 * block + 1, batch_size=batch)
        Trainer(Reflow(model, coupling), settings, title="reflow", callbacks=[seen]).fit()
        return seen.blocks[-1]

    return timer


def generation(model: FlowModel, folder: Path, batch: int) -> harness.Timer:
    """A timer of what a store of `COUNT` pairs costs, for each `batch` of them."""
    store = folder / "again"

    def run() -> None:
        generate_pairs(model, store, COUNT, steps=STEPS, batch_size=batch, gate=None)

    def timer() -> harness.Clocks:
        cpu, wall = harness.clocked(run, 1)
        shutil.rmtree(store)
        return cpu * batch / COUNT, wall * batch / COUNT

    return timer


def compare(size: str, batch: int, *, block: int, rounds: int = 7) -> list[harness.Row]:
    """Steps of both kinds, what the store costs, and where the totals cross."""
    shape = sizes[size].shape
    model = FlowModel(build(size, shape=shape, zero=False).eval(), shape=shape)
    folder = Path(tempfile.mkdtemp(prefix="rectiflow-reflow-"))
    try:
        generate_pairs(model, folder / "pairs", COUNT, steps=STEPS, batch_size=batch, gate=None)
        timers: dict[str, Callable[[], harness.Clocks]] = {
            STORED: training(model, StoredPairs(folder / "pairs"), batch, block),
            LIVE: training(model, LivePairs(model, STEPS, "euler"), batch, block),
            GENERATE: generation(model, folder, batch),
        }
        found = harness.measure(timers, floor=STORED, rounds=rounds)
    finally:
        shutil.rmtree(folder)
    case = f"{size}, batch {batch}, {STEPS} teacher steps"
    cpu, wall = (
        harness.Quartiles.of(
            [
                g[clock] / max(v[clock] - s[clock], 1e-9)
                for g, v, s in zip(*(found.seconds[name] for name in (GENERATE, LIVE, STORED)))
            ]
        )
        for clock in (0, 1)
    )
    return [
        harness.ratio(case, found, LIVE, STORED),
        harness.Row(
            case,
            "passes over the store from which storing is cheaper",
            cpu,
            wall,
            unit="passes",
            note="live pairs are new in every step; a store is used in every pass",
        ),
    ]


def main() -> bool:
    harness.one_thread()
    rows = [row for size, batch in CASES for row in compare(size, batch, block=5)]
    return harness.report("reflow_pairs", __doc__ or "", rows, packages=("torch", "safetensors"))


if __name__ == "__main__":
    harness.finish(main)
