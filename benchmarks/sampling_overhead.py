"""What does sampling cost beyond the calls of the network, here and in other libraries?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import harness
from nets import Convolutions, Toy
from rectiflow.flows import FlowModel, integrate

CALLS, LOOP, OURS = "bare calls", "bare loop", "rectiflow"
Sampler = Callable[[], Tensor]


def bare_calls(net: nn.Module, x: Tensor, steps: int) -> Sampler:
    times = [torch.full((x.shape[0],), i / steps) for i in range(steps)]

    def run() -> Tensor:
        for t in times:
            out = net(x, t)
        return out

    return run


def bare_loop(net: nn.Module, x: Tensor, steps: int) -> Sampler:
    def run() -> Tensor:
        z = x.clone()
        for t in (torch.arange(steps) / steps)[:, None].expand(-1, x.shape[0]).unbind():
            z.add_(net(z, t), alpha=1 / steps)
        return z

    return run


def ours(net: nn.Module, x: Tensor, steps: int) -> Sampler:
    model = FlowModel(net)
    return lambda: integrate(model, x, steps)


def diffusers(net: nn.Module, x: Tensor, steps: int) -> Sampler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    # Its sigma runs from 1 (noise) to 0; equal steps as everywhere else here.
    sigmas = [1 - i / steps for i in range(steps)]

    def run() -> Tensor:
        scheduler.set_timesteps(sigmas=sigmas)
        z = x
        for timestep in scheduler.timesteps:
            t = (1 - timestep / 1000).expand(x.shape[0])
            z = scheduler.step(-net(z, t), timestep, z, return_dict=False)[0]
        return z

    return run


def flow_matching(net: nn.Module, x: Tensor, steps: int) -> Sampler:
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class Wrapped(ModelWrapper):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.model(x, t.expand(x.shape[0]))

    solver = ODESolver(Wrapped(net))
    return lambda: solver.sample(x, step_size=1 / steps, method="euler")


def torchdiffeq(net: nn.Module, x: Tensor, steps: int) -> Sampler:
    from torchdiffeq import odeint

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        return net(z, t.expand(x.shape[0]))

    ends = torch.tensor([0.0, 1.0])
    options = {"step_size": 1 / steps}
    return lambda: odeint(velocity, x, ends, method="euler", options=options)[-1]


PEERS = {"diffusers": diffusers, "flow_matching": flow_matching, "torchdiffeq": torchdiffeq}
# The bound on ours over the peer's total: a clear gain where calls are cheap, no loss elsewhere.
BOUNDS = {"toy": {"diffusers": 0.80, "flow_matching": 0.80}}


def compare(
    case: str, net: nn.Module, x: Tensor, peers: list[str], *, rounds: int, steps: int
) -> list[harness.Row]:
    """All samplers on one network, after checking that they compute the same thing."""
    makers = {LOOP: bare_loop, OURS: ours, **{name: PEERS[name] for name in peers}}
    with torch.inference_mode():
        samplers = {name: make(net, x, steps) for name, make in makers.items()}
        wanted = samplers[LOOP]()
        for name, run in samplers.items():
            torch.testing.assert_close(run(), wanted, atol=1e-4, rtol=1e-4, msg=name)
        timers = {CALLS: harness.block(bare_calls(net, x, steps))}
        timers |= {name: harness.block(run) for name, run in samplers.items()}
        found = harness.measure(timers, floor=CALLS, rounds=rounds)
    rows = [
        harness.ratio(
            case,
            found,
            name,
            CALLS,
            target=1.15 if case == "toy" and name == OURS else None,
            note=f"{found.over(name, CALLS).median / steps * 1e6:.1f} us extra a step",
        )
        for name in makers
    ]
    bounds = {"diffusers": 1.0, "flow_matching": 1.0, **BOUNDS.get(case, {})}
    rows += [
        harness.ratio(case, found, OURS, name, target=bounds.get(name)) for name in [LOOP, *peers]
    ]
    return rows


def main() -> bool:
    harness.one_thread()
    peers = [name for name in PEERS if harness.available(name)]
    rows = compare("toy", Toy(), torch.randn(256, 2), peers, rounds=41, steps=50)
    small = Convolutions(32, 3)
    # Calls that dwarf the loop around them: few steps say the same in less time.
    few = {"rounds": 31, "steps": 4}
    rows += compare("small conv, batch 16", small, torch.randn(16, 1, 28, 28), peers, **few)
    conv = Convolutions(104, 10)
    rows += compare("conv 0.98 M, batch 1", conv, torch.randn(1, 1, 28, 28), peers, **few)
    return harness.report(
        "sampling_overhead", __doc__ or "", rows, packages=("torch", "numpy", *peers)
    )


if __name__ == "__main__":
    harness.finish(main)
