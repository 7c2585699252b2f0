"""What does a step of an optimizer cost against torch's AdamW, looped, foreach and fused?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import harness
from rectiflow.optim import SGDP, AdamP, CoordinateClipped, DiffGrad, SophiaG

LOOP = "AdamW, loop"
# Twelve blocks of a transformer, and the same with little in each tensor.
SIZES = {"5.4 M weights": 192, "41 k weights": 16}
BLOCKS = 12
# Bounds on ours over the loop of AdamW: by name, eager and compiled.
BOUNDS = {"DiffGrad": (1.25, 0.45), "SophiaG": (1.25, 0.45), "clipped SGD": (1.25, 0.45)}
TINY = 0.10

Make = Callable[..., torch.optim.Optimizer]
OURS: dict[str, Make] = {
    "DiffGrad": DiffGrad,
    "AdamP": AdamP,
    "SGDP": partial(SGDP, momentum=0.9),
    "SophiaG": SophiaG,
    "clipped SGD": CoordinateClipped,
}


def weights(width: int) -> list[nn.Parameter]:
    """148 tensors, as of twelve blocks of attention and MLP."""
    shapes: list[tuple[int, ...]] = [(width, width), (width,), (width,), (4, width)]
    for _ in range(BLOCKS):
        shapes += [(3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        shapes += [(width,)] * 4
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]


def stepper(make: Make, params: list[nn.Parameter], **options: object) -> Callable[[], object]:
    """A step on weights of its own, with gradients that are there already."""
    own = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = make(own, lr=1e-4, **options)
    generator = torch.Generator().manual_seed(1)
    for p in own:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return optimizer.step


def peers() -> dict[str, Make]:
    """Other libraries' optimizers, where they are installed."""
    found: dict[str, Make] = {}
    if harness.available("pytorch_optimizer"):
        import pytorch_optimizer as peer

        found |= {
            "pytorch_optimizer DiffGrad": peer.DiffGrad,
            "pytorch_optimizer AdamP": peer.AdamP,
        }
    if harness.available("adamp"):
        import adamp

        found["adamp AdamP"] = adamp.AdamP
    return found


def compare(case: str, width: int, *, compiled: bool) -> list[harness.Row]:
    """All optimizers on weights of one width."""
    params = weights(width)
    looped: dict[str, Make] = {
        LOOP: partial(torch.optim.AdamW, foreach=False),
        "AdamW, foreach": partial(torch.optim.AdamW, foreach=True),
        "AdamW, fused": partial(torch.optim.AdamW, fused=True),
    }
    makers = {**looped, **peers(), **OURS}
    if compiled:
        names = [name for name in BOUNDS if name in OURS]
        makers |= {f"{name}, compiled": partial(OURS[name], compile=True) for name in names}
    rows = []
    # A few at a time: a dozen optimizers would push each other out of every cache.
    floor = makers.pop(LOOP)
    for name, make in makers.items():
        timers = {
            LOOP: harness.block(stepper(floor, params)),
            name: harness.block(stepper(make, params)),
        }
        found = harness.measure(timers, floor=LOOP, rounds=61)
        kind = name.partition(",")[0]
        target = None
        if kind in BOUNDS:
            target = BOUNDS[kind][name.endswith("compiled")] if width > 100 else TINY
        elif kind == "AdamP" and width > 100:
            target = 1.5
        rows.append(harness.ratio(case, found, name, LOOP, target=target))
    return rows


def compile_seconds(width: int) -> harness.Row:
    """Seconds of the first compiled step of a process, with nothing compiled before or kept."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    run = stepper(partial(DiffGrad, compile=True), weights(width))
    start = time.process_time(), time.perf_counter()
    run()
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    return harness.Row(
        "41 k weights",
        "first compiled step",
        harness.Quartiles(cpu, cpu, cpu),
        harness.Quartiles(wall, wall, wall),
        unit="s",
        target=5.0,
        clock="wall",
    )


def main() -> bool:
    harness.one_thread()
    compiled = "--compile" in sys.argv
    rows = [compile_seconds(SIZES["41 k weights"])] if compiled else []
    for case, width in SIZES.items():
        rows += compare(case, width, compiled=compiled)
    packages = ("torch", "pytorch_optimizer", "adamp")
    known = tuple(name for name in packages if harness.available(name))
    return harness.report("optimizer_step", __doc__ or "", rows, packages=known)


if __name__ == "__main__":
    harness.finish(main)
