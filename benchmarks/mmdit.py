"""What do MMDiT's forward and training step cost beside diffusers' transformer of the same size?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import harness
from rectiflow.interop import sd3
from rectiflow.nets import MMDiT

OURS, THEIRS = "MMDiT", "SD3Transformer2DModel"
BATCH, TOKENS = 2, 77
Calls = dict[str, tuple[nn.Module, Callable[[], torch.Tensor]]]
KINDS: dict[str, dict[str, object]] = {
    "width 256, depth 6": {},
    "width 256, depth 6, rms and dual": {"qk_norm": "rms", "dual_layers": (0, 1, 2)},
}


def networks(**options: object) -> Calls:
    """Ours and theirs with the same weights, none of them zero, and calls on the same inputs."""
    ours = MMDiT(
        shape=(16, 32, 32),
        depth=6,
        heads=4,
        context_dim=512,
        pooled_dim=256,
        max_size=24,
        **options,
    )
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    theirs = sd3.to_diffusers(ours)
    x, t = torch.randn(BATCH, 16, 32, 32), torch.rand(BATCH)
    context, pooled = torch.randn(BATCH, TOKENS, 512), torch.randn(BATCH, 256)
    return {
        OURS: (ours, lambda: ours(x, t, context=context, pooled=pooled)),
        THEIRS: (theirs, lambda: theirs(x, context, pooled, 1000 * (1 - t), return_dict=False)[0]),
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a run holds beyond what was there before it.

    Allocations are replayed from a trace: unlike the size of the process, this does not depend on
    what the allocator keeps.
    """
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    level = most = 0
    for _, change in changes:
        level += change
        most = max(most, level)
    return most


def main() -> bool:
    harness.one_thread()
    if not harness.available("diffusers"):
        return True
    rows = []
    for kind, options in KINDS.items():
        calls = networks(**options)
        rows += [*compare(kind, "forward", forward(calls)), *compare(kind, "step", step(calls))]
    packages = ("torch", "diffusers")
    return harness.report("mmdit", __doc__ or "", rows, packages=packages)


def forward(calls: Calls) -> dict[str, Callable[[], object]]:
    """Runs of the networks without gradients."""

    def bare(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(call)

    return {name: bare(call) for name, (_, call) in calls.items()}


def step(calls: Calls) -> dict[str, Callable[[], object]]:
    """Forward, loss and backward; gradients are dropped, so that each run makes them anew."""

    def train(net: nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            call().square().mean().backward()
            net.zero_grad(set_to_none=True)

        return run

    return {name: train(*pair) for name, pair in calls.items()}


def compare(kind: str, what: str, runs: dict[str, Callable[[], object]]) -> list[harness.Row]:
    """Time and peak memory of both."""
    timers = {name: harness.block(run) for name, run in runs.items()}
    case = f"{kind}, {what}"
    found = harness.measure(timers, floor=THEIRS, rounds=9)
    rows = [harness.ratio(case, found, OURS, THEIRS, target=1.0)]
    ours, theirs = (peak_bytes(runs[name]) for name in (OURS, THEIRS))
    same = harness.Quartiles(ours / theirs, ours / theirs, ours / theirs)
    note = f"{ours / 2**20:.1f} MiB against {theirs / 2**20:.1f} MiB"
    figure = f"peak memory, {OURS} / {THEIRS}"
    return [*rows, harness.Row(case, figure, same, same, target=1.0, note=note)]


if __name__ == "__main__":
    harness.finish(main)
