"""What does steering cost beside plain sampling, and beside the exact gradient?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import harness
from nets import Convolutions
from rectiflow.flows import FlowModel, integrate
from rectiflow.guidance import FlowChef, LinearInverse
from rectiflow.images.degradations import Downscale, LinearOperator, Mask, box_mask
from rectiflow.training.peak_memory import PeakMemory

STEPS, BATCH, SHAPE = 10, 4, (1, 28, 28)
PLAIN, CHEF, EXACT, FUSED = "plain sampling", "FlowChef", "exact gradient", "exact, own loop"


def plain(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model = FlowModel(net)
    return lambda: integrate(model, x, STEPS)


def steered(
    net: nn.Module, x: Tensor, cost: LinearInverse, *, skip: bool = True
) -> Callable[[], Tensor]:
    model, chef = FlowModel(net), FlowChef(cost, skip=skip, growth=float("inf"))
    return lambda: integrate(model, x, STEPS, correctors=(chef,))


def fused(net: nn.Module, x: Tensor, cost: LinearInverse) -> Callable[[], Tensor]:
    """A loop written for the exact gradient: one call of the network a step, and its derivative.

    As a corrector, `skip=False` calls the network a second time.
    """
    curvature = cost.curvature(SHAPE)

    def run() -> Tensor:
        z = x
        for i in range(STEPS):
            t = torch.full((BATCH,), i / STEPS)
            with torch.enable_grad():
                free = z.detach().requires_grad_()
                v = net(free, t)
                data = free + (1 - i / STEPS) * v
                _, slope = cost.gradient(data.detach())
                (gradient,) = torch.autograd.grad(data, free, slope)
            z = z + v.detach() / STEPS
            if i < STEPS - 1:
                z = z - 0.1 / curvature * gradient
        return z

    return run


def peak(run: Callable[[], Tensor]) -> int:
    """Most bytes of tensors alive at once."""
    with PeakMemory() as found:
        run()
    return found.bytes


def compare(case: str, net: nn.Module, operator: LinearOperator) -> list[harness.Row]:
    x = torch.randn(BATCH, *SHAPE)
    cost = LinearInverse(operator, operator.A(torch.rand(BATCH, *SHAPE) * 2 - 1))
    with torch.no_grad():
        runs = {
            PLAIN: plain(net, x),
            CHEF: steered(net, x, cost),
            EXACT: steered(net, x, cost, skip=False),
            FUSED: fused(net, x, cost),
        }
        memory = {name: peak(run) for name, run in runs.items()}
        timers = {name: harness.block(run) for name, run in runs.items()}
        found = harness.measure(timers, floor=PLAIN, rounds=11)
    rows = [
        harness.ratio(case, found, CHEF, PLAIN, target=1.1),
        harness.ratio(case, found, EXACT, CHEF, target=2.5, lower_bound=True),
        harness.ratio(case, found, FUSED, CHEF),
    ]
    for name, base, target in ((CHEF, PLAIN, 1.1), (EXACT, CHEF, None), (FUSED, CHEF, None)):
        value = harness.Quartiles.of([memory[name] / memory[base]] * 2)
        rows.append(
            harness.Row(
                case,
                f"{name} / {base}, peak memory",
                value,
                value,
                target=target,
                note=f"{memory[name] / 1e6:.3g} MB against {memory[base] / 1e6:.3g} MB",
            )
        )
    return rows


def main() -> bool:
    harness.one_thread()
    net = Convolutions(64, 6)
    rows = compare("inpaint, conv 0.22 M", net, Mask(box_mask(SHAPE, 12)))
    rows += compare("enlarge, conv 0.22 M", net, Downscale(2))
    return harness.report("flowchef", __doc__ or "", rows)


if __name__ == "__main__":
    harness.finish(main)
