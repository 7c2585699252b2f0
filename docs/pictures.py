"""Draw the pictures of the concept pages: `python docs/pictures.py [NAME...]`.

Every picture uses fields known in closed form, so it is made in seconds and without training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from rectiflow.flows import (
    CosinePath,
    RectifiedPath,
    Trajectory,
    VariancePreservingPath,
    adaptive_times,
    integrate,
)
from rectiflow.flows.analytic import GaussianField, KernelField, SoftmaxField
from rectiflow.flows.metrics import straightness, transport_cost
from rectiflow.flows.mixture import MixtureField

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ASSETS = Path(__file__).parent / "assets"
STEPS = 50
SOURCE, TARGET, BEFORE, AFTER = "#8a8f98", "#1b1f24", "#2f6fb0", "#d1603d"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring(count: int, centres: int = 6, radius: float = 4.0, spread: float = 0.25) -> Tensor:
    """Points around a few centres on a circle."""
    angle = 2 * torch.pi * (torch.arange(count) % centres) / centres
    centre = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + spread * torch.randn(count, 2, generator=seeded(1))


def follow(field: Any, source: Tensor) -> Tensor:
    """The ends of the trajectories; Euler never asks for the field at t = 1, where it is steep."""
    return integrate(field, source, STEPS, "euler")


def ways(field: Any, source: Tensor) -> Tensor:
    """The states along the way of each source, `(steps + 1, b, 2)`."""
    seen = Trajectory()
    integrate(field, source, STEPS, "euler", correctors=(seen,))
    return torch.stack(seen.states)


def rectified_twice(points: int = 600, pairs: int = 1500) -> tuple[SoftmaxField, KernelField]:
    """The exact first flow to the ring, and the flow of the pairs that it makes."""
    first = SoftmaxField(ring(points))
    noise = torch.randn(pairs, 2, generator=seeded(2))
    return first, KernelField(noise, follow(first, noise), bandwidth=0.02, neighbours=40)


def square(axis: plt.Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("first coordinate")
    axis.set_ylabel("second coordinate")
    axis.set_aspect("equal")


def paths() -> plt.Figure:
    """One pair joined by two paths, and the coefficients of each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    t = torch.linspace(0, 1, 101)
    source, target = torch.tensor([[0.3, 2.0]]), torch.tensor([[2.2, 0.3]])
    for path, colour, label in (
        (RectifiedPath(), AFTER, "rectified"),
        (VariancePreservingPath(), BEFORE, "variance preserving"),
    ):
        line = path.interpolate(source.expand(101, 2), target.expand(101, 2), t)
        left.plot(*line.T, color=colour, label=label)
        left.plot(*line[::20].T, ".", color=colour)
        right.plot(t, path.alpha(t), color=colour)
        right.plot(t, path.sigma(t), "--", color=colour)
    left.plot(*source.T, "o", color=SOURCE, label="source, t = 0")
    left.plot(*target.T, "s", color=TARGET, label="target, t = 1")
    square(left, "one pair, a dot every 0.2")
    right.set(xlabel="time t", ylabel="coefficient", title="alpha (solid) and sigma (dashed)")
    right.title.set_fontsize(10)
    left.legend(fontsize=7, loc="lower left")
    return figure


def reflow() -> plt.Figure:
    """Ways before and after one reflow, with straightness and cost."""
    first, second = rectified_twice()
    noise = torch.randn(300, 2, generator=seeded(3))
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharex=True, sharey=True)
    for axis, field, colour, title in (
        (axes[0], first, BEFORE, "1-rectified flow"),
        (axes[1], second, AFTER, "after one reflow"),
    ):
        every = ways(field, noise)
        cost = transport_cost(noise, every[-1])
        bend = straightness(field, noise, STEPS).total
        lines = every[:, :60]
        axis.plot(lines[..., 0], lines[..., 1], color=colour, linewidth=0.7)
        axis.plot(*lines[0].T, ".", color=SOURCE, markersize=4, label="source")
        axis.plot(*lines[-1].T, ".", color=TARGET, markersize=4, label="where it arrives")
        square(axis, f"{title}\nS = {bend:.2f}, cost = {cost:.2f}")
    axes[0].legend(fontsize=7, loc="upper center")
    return figure


def couplings() -> plt.Figure:
    """Pairs drawn independently and pairs joined by a flow."""
    data = ring(600)
    noise = torch.randn(60, 2, generator=seeded(3))
    joined = follow(SoftmaxField(data), noise)
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharex=True, sharey=True)
    for axis, ends, colour, title in (
        (axes[0], data[:60], BEFORE, "independent pairs cross"),
        (axes[1], joined, AFTER, "pairs made by a flow hardly do"),
    ):
        lines = torch.stack([noise, ends])
        axis.plot(lines[..., 0], lines[..., 1], color=colour, linewidth=0.6)
        axis.plot(*noise.T, ".", color=SOURCE, markersize=4)
        axis.plot(*ends.T, ".", color=TARGET, markersize=4)
        square(axis, f"{title}\ntransport cost {transport_cost(noise, ends):.2f}")
    return figure


def solvers() -> plt.Figure:
    """Error against field evaluations, with its slope as the order."""
    field = GaussianField(torch.tensor([1.0, -2.0]), torch.tensor([0.4, 2.0]))
    source = torch.randn(256, 2, generator=seeded(4), dtype=torch.float64)
    exact = field.transport(source)
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for solver, calls in (("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)):
        counts = [2, 4, 8, 16, 32, 64]
        errors = [
            float((integrate(field, source, n, solver) - exact).square().sum(1).mean().sqrt())
            for n in counts
        ]
        axis.loglog([calls * n for n in counts], errors, "o-", markersize=4, label=solver)
    axis.set(xlabel="evaluations of the field", ylabel="root mean square error")
    axis.set_title("a flow known in closed form: from normal noise to a normal", fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def fitted_grids() -> plt.Figure:
    """Error of Euler with equal steps and with a fitted grid, on three paths."""
    angles = torch.arange(6, dtype=torch.float64) * math.pi / 3
    means = 4 * torch.stack([angles.cos(), angles.sin()], 1)
    source = torch.randn(400, 2, generator=seeded(5), dtype=torch.float64)
    counts = [4, 8, 16, 32]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
    for axis, path in zip(axes, (RectifiedPath(), VariancePreservingPath(), CosinePath())):
        field = MixtureField(means, torch.ones(6, dtype=torch.float64), 0.25, path)
        start = path.start(source)
        exact = integrate(field, start, 400, "rk4")

        def errors(grids: list[Any], field=field, start=start, exact=exact) -> list[float]:
            ends = [integrate(field, start, grid) for grid in grids]
            return [float((end - exact).square().sum(1).mean().sqrt()) for end in ends]

        fitted = [adaptive_times(field, n, source=source[:256]) for n in counts]
        axis.loglog(counts, errors(list(counts)), "o-", ms=4, color=BEFORE, label="equal steps")
        axis.loglog(counts, errors(fitted), "o-", ms=4, color=AFTER, label="fitted grid")
        marks = (0.02, 0.05, 0.1, 0.2, 0.5)
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axis.minorticks_off()
        axis.set(xlabel="Euler steps", title=path.name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("root mean square error")
    axes[0].legend(fontsize=8)
    return figure


def one_step() -> plt.Figure:
    """What one Euler step gives before and after reflow."""
    first, second = rectified_twice()
    fresh = torch.randn(500, 2, generator=seeded(4))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharex=True, sharey=True)
    for axis, points, colour, title in (
        (axes[0], ring(500), TARGET, "data"),
        (axes[1], integrate(first, fresh, 1), BEFORE, "one step of the first flow"),
        (axes[2], integrate(second, fresh, 1), AFTER, "one step after reflow"),
    ):
        axis.plot(*points.T, ".", color=colour, markersize=2)
        square(axis, title)
    return figure


PICTURES: dict[str, Callable[[], plt.Figure]] = {
    "paths": paths,
    "couplings": couplings,
    "reflow": reflow,
    "solvers": solvers,
    "fitted-grids": fitted_grids,
    "one-step": one_step,
}


def main(names: list[str]) -> None:
    ASSETS.mkdir(exist_ok=True)
    for name in names or PICTURES:
        figure = PICTURES[name]()
        figure.tight_layout()
        figure.savefig(ASSETS / f"{name}.png", dpi=85)
        plt.close(figure)
        print(f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
