"""What does a training step through `Trainer` cost beyond a bare loop that does the same work?"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import harness
from harness import AGAIN, Clocks, Rounds
from rectiflow.flows import FlowModel, Independent
from rectiflow.nets import build, sizes
from rectiflow.training import FlowMatching, Trainer, TrainerSettings

BARE, OURS = "bare loop", "Trainer"


def bare_step(net: nn.Module, data: Tensor, batch: int) -> Callable[[], None]:
    """Draw, interpolate, regress, clip, fused Adam, average: written by hand."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    live = [p.detach() for p in net.parameters()]
    average = [p.clone() for p in live]
    order, position = torch.randperm(len(data)), 0

    def step() -> None:
        nonlocal order, position
        if position + batch > len(data):
            order, position = torch.randperm(len(data)), 0
        target = data[order[position : position + batch]]
        position += batch
        source, t = torch.randn_like(target), torch.rand(batch)
        x = torch.lerp(source, target, t.reshape(-1, *(1,) * (target.ndim - 1)))
        loss = nn.functional.mse_loss(net(x, t), target - source)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, live, 0.001)

    return step


class Alternating:
    """A callback that runs blocks of the bare loop between equally long blocks of a real `fit`.

    So the trainer is timed with all that surrounds its steps: progress, loss window, log.
    """

    def __init__(self, bare: Callable[[], None], steps: int) -> None:
        self.bare, self.steps = bare, steps
        self.seconds: dict[str, list[Clocks]] = {OURS: [], BARE: [], AGAIN: []}
        self.mark: Clocks | None = None

    def __call__(self, trainer: Trainer, step: int) -> None:
        if step % self.steps:
            return
        now = time.process_time(), time.perf_counter()
        if self.mark is not None:
            self.seconds[OURS].append((now[0] - self.mark[0], now[1] - self.mark[1]))
            for name in (BARE, AGAIN):
                self.seconds[name].append(harness.clocked(self.bare, self.steps))
        gc.collect()
        gc.disable()
        self.mark = time.process_time(), time.perf_counter()

    def rounds(self) -> Rounds:
        """Seconds of one step in every round but the first two, which warm up."""
        return Rounds(
            {
                name: [(cpu / self.steps, wall / self.steps) for cpu, wall in blocks[2:]]
                for name, blocks in self.seconds.items()
            }
        )


def compare(size: str, batch: int, *, block: int, rounds: int, target: float) -> harness.Row:
    """A trainer and a bare loop over the same network and data, step for step."""
    shape = sizes[size].shape
    data = torch.randn(max(1797, 4 * batch), *shape)
    net = build(size, shape=shape)

    def collect() -> Rounds:
        alternating = Alternating(bare_step(copy.deepcopy(net), data, batch), block)
        method = FlowMatching(FlowModel(copy.deepcopy(net), shape=shape), Independent(data))
        settings = TrainerSettings(steps=block * (rounds + 3), batch_size=batch)
        try:
            Trainer(method, settings, title=size, callbacks=[alternating]).fit()
        finally:
            gc.enable()
        return alternating.rounds()

    found = harness.trusted(collect, floor=BARE)
    return harness.ratio(f"{size}, batch {batch}", found, OURS, BARE, target=target)


def main() -> bool:
    harness.one_thread()
    rows = [
        compare("mlp-digits", 256, block=5, rounds=31, target=1.15),
        compare("unet-xs", 64, block=1, rounds=31, target=1.03),
    ]
    return harness.report("training_step", __doc__ or "", rows, packages=("torch", "accelerate"))


if __name__ == "__main__":
    harness.finish(main)
