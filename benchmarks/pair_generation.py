"""How much of the throughput of bare sampling is left when pairs are written to disk?"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

import harness
from rectiflow.distill import generate_pairs
from rectiflow.flows import FlowModel
from rectiflow.nets import build, sizes

SIZE, COUNT, BATCH, STEPS = "mlp-digits", 2048, 1024, 20
BARE, PAIRS = "bare sampling", "generate_pairs"


def main() -> bool:
    harness.one_thread()
    shape = sizes[SIZE].shape
    net = build(SIZE, shape=shape, zero=False).eval()
    model = FlowModel(net, shape=shape)
    folder = Path(tempfile.mkdtemp(prefix="rectiflow-pairs-"))

    def bare() -> None:
        times = (torch.arange(STEPS) / STEPS)[:, None].expand(-1, BATCH).unbind()
        with torch.no_grad():
            for _ in range(COUNT // BATCH):
                z = torch.randn(BATCH, *shape)
                for t in times:
                    z = z + net(z, t) / STEPS

    def pairs() -> None:
        # The gate is one fixed check of a few pairs a store: no part of the throughput.
        store = folder / "store"
        generate_pairs(model, store, COUNT, steps=STEPS, batch_size=BATCH, gate=None)
        shutil.rmtree(store)

    try:
        timers = {BARE: harness.block(bare), PAIRS: harness.block(pairs)}
        found = harness.measure(timers, floor=BARE, rounds=11)
    finally:
        shutil.rmtree(folder)
    # Seconds of the bare loop over ours: the share of its throughput that is kept.
    case = f"{SIZE}, {COUNT} pairs, {STEPS} steps"
    rows = [harness.ratio(case, found, BARE, PAIRS, target=0.95, lower_bound=True)]
    return harness.report("pair_generation", __doc__ or "", rows, packages=("torch", "safetensors"))


if __name__ == "__main__":
    harness.finish(main)
