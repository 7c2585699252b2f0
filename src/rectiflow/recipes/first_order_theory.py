"""The theorem of rectified diffusion on an example that is known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectiflow.flows.diffusion_paths import CosinePath
from rectiflow.flows.integration import Trajectory, integrate
from rectiflow.flows.metrics import first_order_gap
from rectiflow.flows.paired_gaussian import PairedGaussian


@dataclass(frozen=True)
class Theory:
    """An exactly rectified Gaussian.

    Attributes:
        gap: its first-order gap, 0 up to rounding.
        difference: the largest difference of samples made in 1, 2 and 8 first-order steps.
        curvature: how far states get from the chord of their trajectory, as a part of its length,
            on average over trajectories.
        panels: states along trajectories, as they are and divided by `alpha + sigma`.
    """

    gap: float
    difference: float
    curvature: float
    panels: dict[str, list[Tensor]]


def exact_rectification(*, count: int = 200, shown: int = 30) -> Theory:
    """Noises in the plane carried to N(m, s²) by deterministic linear pairs on the cosine path.

    Example:
        >>> found = exact_rectification(count=20)
        >>> found.difference < 1e-6, found.curvature > 0.05
        (True, True)

    Source: arXiv 2410.07303, theorem 1.
    """
    path = CosinePath()
    mean, std = torch.tensor([[2.0, -1.0], [0.4, 1.5]], dtype=torch.float64)
    field = PairedGaussian(mean, std, path)
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    one, two, eight = (integrate(field, source, n, "first-order") for n in (1, 2, 8))
    seen = Trajectory()
    integrate(field, source, 50, "first-order", correctors=(seen,))
    times = torch.tensor(seen.times, dtype=torch.float64)
    total = (path.alpha(times) + path.sigma(times)).tolist()
    states = [state[:shown] for state in seen.states]
    return Theory(
        gap=first_order_gap(field, source, 50).total,
        difference=float(torch.stack([two - one, eight - one]).abs().max()),
        curvature=chord_distance(seen.states),
        panels={
            "states x": states,
            "x / (alpha + sigma)": [state / size for state, size in zip(states, total)],
        },
    )


def chord_distance(states: list[Tensor]) -> float:
    """The largest distance of each trajectory from its chord over the chord's length, averaged.

    Example:
        >>> bent = [[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 0.0]]]
        >>> chord_distance([torch.tensor(s) for s in bent])
        0.5
    """
    line = torch.stack(states).flatten(2)
    chord = line[-1] - line[0]
    length = chord.norm(dim=1)
    along = line - line[0]
    share = (along * chord).sum(2) / length.square()
    aside = (along - share.unsqueeze(2) * chord).norm(dim=2).amax(0)
    return float((aside / length).mean())
