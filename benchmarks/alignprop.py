"""How much memory and time does reward backpropagation take in 40 steps instead of 10?"""

from __future__ import annotations

import functools

import harness
from harness import Quartiles, Row
from rectiflow.align import AlignProp, Fixed, peak_bytes
from rectiflow.align.rewards import Brightness
from rectiflow.flows import FlowModel
from rectiflow.flows.couplings import Draw
from rectiflow.nets import build, sizes

SIZE, BATCH, STEPS = "unet-xs", 4, (10, 40)


def updated(steps: int, *, checkpoint: bool) -> functools.partial[None]:
    """One update's forward and backward pass, the whole chain in the graph."""
    shape = sizes[SIZE].shape
    model = FlowModel(build(SIZE, shape=shape), shape=shape)
    method = AlignProp(
        model, Brightness(), steps=steps, solver="euler", truncation=Fixed(0), checkpoint=checkpoint
    )
    return functools.partial(_update, method)


def _update(method: AlignProp) -> None:
    method.loss(Draw.of(BATCH)).backward()
    method.model.zero_grad(set_to_none=True)


def memory(checkpoint: bool) -> Row:
    """The ratio of peaks; it is counted, not timed, so it has no spread."""
    few, many = (peak_bytes(updated(steps, checkpoint=checkpoint)) for steps in STEPS)
    value = Quartiles(many / few, many / few, many / few)
    return Row(
        f"{SIZE}, batch {BATCH}, {'checkpoints' if checkpoint else 'no checkpoints'}",
        f"peak memory, {STEPS[1]} steps / {STEPS[0]} steps",
        value,
        value,
        target=1.3 if checkpoint else None,
        note=f"{many / 2**20:.1f} MiB against {few / 2**20:.1f} MiB",
    )


def time() -> Row:
    """What checkpoints cost: one more forward pass, so 4/3 of the time if that were all."""
    names = {True: "checkpoints", False: "no checkpoints"}
    timers = {
        name: harness.block(updated(STEPS[0], checkpoint=keep)) for keep, name in names.items()
    }
    found = harness.measure(timers, floor=names[False], rounds=7)
    return harness.ratio(f"{SIZE}, batch {BATCH}, {STEPS[0]} steps", found, *names.values())


def main() -> bool:
    harness.one_thread()
    rows = [memory(True), memory(False), time()]
    return harness.report("alignprop", __doc__ or "", rows, packages=("torch", "peft"))


if __name__ == "__main__":
    harness.finish(main)
