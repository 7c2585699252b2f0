"""How much of the throughput of bare sampling is left when pairs are written to disk?"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

import harness
from rectiflow.distill import generate_pairs
from rectiflow.flows import FlowModel
from rectiflow.nets import build, sizes

SIZE, COUNT, BATCH, STEPS = "mlp-digits", 2048, 1024, 20
BARE, PAIRS = "bare sampling", "generate_pairs"
FEW, MANY = 2048, 32768


def network() -> FlowModel:
    """The model that all figures are about."""
    shape = sizes[SIZE].shape
    return FlowModel(build(SIZE, shape=shape, zero=False).eval(), shape=shape)


def generate(count: int) -> None:
    """Generate and forget, in a process whose memory somebody watches."""
    harness.one_thread()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        generate_pairs(
            network(), store, count, steps=1, batch_size=BATCH, shard_size=BATCH, gate=None
        )


def memory() -> harness.Row:
    """The peak for sixteen times as many pairs."""
    few, many = (harness.peak_mib(__file__, str(count)) for count in (FEW, MANY))
    same = harness.Quartiles(many / few, many / few, many / few)
    return harness.Row(
        f"{SIZE}, shards of {BATCH}",
        f"peak memory, {MANY} pairs / {FEW} pairs",
        same,
        same,
        target=1.05,
        note=f"{many:.0f} MiB against {few:.0f} MiB, the interpreter and torch included",
    )


def main() -> bool:
    harness.one_thread()
    held = memory()
    model = network()
    net, shape = model.net, sizes[SIZE].shape
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
    rows = [harness.ratio(case, found, BARE, PAIRS, target=0.95, lower_bound=True), held]
    return harness.report("pair_generation", __doc__ or "", rows, packages=("torch", "safetensors"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        generate(int(sys.argv[1]))
    else:
        harness.finish(main)
