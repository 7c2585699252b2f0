"""Does compiling ten steps into one call make sampling a small network faster?"""

from __future__ import annotations

import time

import torch

import harness
from nets import Toy
from rectiflow.flows import CompiledSampler, FlowModel
from sampling_overhead import LOOP, bare_loop, ours

COMPILED = "compiled, 10 steps a call"
STEPS = 50


def main() -> bool:
    harness.one_thread()
    net, x = Toy(), torch.randn(256, 2)
    sampler = CompiledSampler(FlowModel(net), steps_per_call=10)
    with torch.inference_mode():
        begin = time.perf_counter()
        first = sampler(x, STEPS)
        seconds = time.perf_counter() - begin
        torch.testing.assert_close(first, bare_loop(net, x, STEPS)(), atol=1e-4, rtol=1e-4)
        runs = {
            LOOP: bare_loop(net, x, STEPS),
            COMPILED: lambda: sampler(x, STEPS),
            "rectiflow": ours(net, x, STEPS),
        }
        timers = {name: harness.block(run) for name, run in runs.items()}
        found = harness.measure(timers, floor=LOOP, rounds=41)
    note = f"first call with compiling {seconds:.1f} s"
    rows = [
        harness.ratio("toy", found, COMPILED, LOOP, target=0.85, note=note),
        harness.ratio("toy", found, COMPILED, "rectiflow"),
    ]
    return harness.report("compiled_sampling", __doc__ or "", rows)


if __name__ == "__main__":
    harness.finish(main)
