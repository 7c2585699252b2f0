"""How much of an image is lost in a round trip, evaluation by evaluation, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable

import torch

import harness
from rectiflow.flows import Counted, FlowModel, SoftmaxField, integrate, uniform_times
from rectiflow.nets import build, sizes
from rectiflow.training.data import load

BUDGETS = (20, 40, 60)
IMAGES = 64
RF, EULER, HEUN = "RF-Solver", "Euler", "diffusers' FlowMatchHeun"


class Smooth:
    """The exact field of digits under a little noise: smooth where that of points is not."""

    def __init__(self, data: torch.Tensor, noise: float) -> None:
        self.field, self.noise = SoftmaxField(data), noise

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # With data + noise N as target, x_t = t data + s N' with s² = (1 - t)² + (t noise)².
        spread = ((1 - t).square() + (self.noise * t).square()).sqrt()
        # The state of the plain flow, and its time, with the same ratio of data to noise.
        whole = t + spread
        data = self.field.denoise(x / whole.reshape(-1, 1, 1, 1), t / whole)
        where = (-1, 1, 1, 1)
        slope = ((self.noise**2 * t - (1 - t)) / spread).reshape(where)
        noise = (x - t.reshape(where) * data) / spread.reshape(where)
        return data + slope * noise


def heun_scheduler(field: Counted, x: torch.Tensor, evaluations: int) -> torch.Tensor:
    """From noise to data by diffusers' scheduler, whose model predicts noise - data."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps((evaluations + 1) // 2)
    for timestep in scheduler.timesteps:
        t = (1 - timestep / 1000).expand(len(x)).to(x.dtype)
        x = scheduler.step(-field(x, t), timestep, x, return_dict=False)[0]
    return x


def main() -> bool:
    harness.one_thread()
    digits = load("digits", split="train").batch(torch.arange(600))
    images = load("digits", split="test").batch(torch.arange(IMAGES)).double()
    field = Smooth(digits.double(), 0.3).velocity
    noise = integrate(field, images, uniform_times(1000, start=1, stop=0), "rk4")

    def error(found: torch.Tensor) -> float:
        return float((found.double() - images).square().mean().sqrt())

    def trip(solver: str, steps: int) -> float:
        there = integrate(field, images, uniform_times(steps, start=1, stop=0), solver)
        return error(integrate(field, there, steps, solver))

    def one_way(solver: str, steps: int) -> float:
        return error(integrate(field, noise, steps, solver))

    rows = []
    for budget in BUDGETS:
        case = f"{budget} evaluations each way"
        ours = trip("rf-solver", budget // 2)
        ratio = trip("euler", budget) / ours
        # Below ten steps the field near the data is stiffer than the step is short.
        rows.append(_row(case, f"round trip, {EULER} / {RF}", ratio, 2.0, ours))
        ours = one_way("rf-solver", budget // 2)
        ratio = one_way("euler", budget) / ours
        rows.append(_row(case, f"from exact noises, {EULER} / {RF}", ratio, 1.0, ours))
        if harness.available("diffusers"):
            counted = Counted(field)
            # It begins at noise level 1 and cannot begin at 0, so it has no way back.
            peer = error(heun_scheduler(counted, noise, budget))
            note = f"{counted.evaluations} evaluations"
            name = f"from exact noises, {HEUN} / {RF}"
            rows.append(_row(case, name, peer / ours, 1.0, ours, note))
    return harness.report(
        "rf_solver", __doc__ or "", [*rows, _cost()], packages=("torch", "diffusers")
    )


def _row(
    case: str, figure: str, ratio: float, target: float, ours: float, note: str = ""
) -> harness.Row:
    """A ratio of errors, which no clock changes."""
    same = harness.Quartiles(ratio, ratio, ratio)
    note = "; ".join(filter(None, (f"ours {ours:.2e}", note)))
    return harness.Row(case, figure, same, same, target=target, lower_bound=True, note=note)


def _cost() -> harness.Row:
    """The time of RF-Solver's steps against Euler's at equal evaluations."""
    shape = sizes["mlp-digits"].shape
    model = FlowModel(build("mlp-digits", shape=shape, zero=False).eval(), shape=shape)
    x = torch.randn(256, *shape)

    def follow(solver: str, steps: int) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                integrate(model, x, steps, solver)

        return run

    timers = {
        EULER: harness.block(follow("euler", 20)),
        RF: harness.block(follow("rf-solver", 10)),
    }
    found = harness.measure(timers, floor=EULER)
    return harness.ratio("mlp-digits, 20 evaluations", found, RF, EULER, target=1.05)


if __name__ == "__main__":
    harness.finish(main)
