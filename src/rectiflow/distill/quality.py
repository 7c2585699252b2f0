"""Are pairs good enough to train on? A bad solver bakes its error into the next flow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.errors import PairQualityError, positive
from rectiflow.flows.couplings import Pairs
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.integration import integrate, time_grid
from rectiflow.flows.pair_format import solver_of
from rectiflow.flows.pair_store import PairStore
from rectiflow.flows.sampling import condition_rows

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class PairGate:
    """How far pairs may be from those of a finer solver.

    All errors are relative: of sources to their own standard deviation, of targets to the data
    scale, the root mean square of their standard deviations. The round trip is the median over
    pairs: generation contracts space where data are flat, so encoding may blow up a tiny error of
    a single target without bound, which says nothing about the other pairs. The limits reject
    10 Euler steps on a well-trained digits flow. Measured there (round trip, difference, standard
    deviations, Fréchet): Euler 10 steps 0.68, 0.089, 0.057, 0.0045; 50 steps 0.23, 0.019, 0.013,
    0.0002; Heun 10 steps 0.53, 0.033, 0.026, 0.0008; 20 steps 0.09, 0.009, 0.006, 0.0001; after
    one reflow Euler 10 steps 0.23, 0.021, 0.004, 0.0001.

    Args:
        pairs: pairs looked at.
        finer: the reference takes this many steps for one of the pairs' solver.
        round_trip: largest median error of the sources got back by encoding the targets.
        difference: largest root mean square distance to the reference's targets.
        moments: largest difference of means and of standard deviations, over dimensions.
        frechet: largest Fréchet distance to the reference's targets in pixel space, as a part of
            their total variance.
    """

    pairs: int = 256
    finer: int = 4
    round_trip: float = 0.5
    difference: float = 0.05
    moments: float = 0.05
    frechet: float = 0.003

    def __post_init__(self) -> None:
        for name in ("round_trip", "difference", "moments", "frechet"):
            positive(name, getattr(self, name))
        if self.pairs < 2 or self.finer < 2:
            raise ValueError(f"pairs and finer must be >= 2, got {self.pairs} and {self.finer}")


@dataclass(frozen=True)
class PairQuality:
    """How good pairs are; every number is 0 for exact ones.

    Attributes:
        round_trip_error: median over pairs of the root mean square error of the sources got back.
        finer_difference: root mean square distance to a finer solver's targets.
        mean_difference: root mean square difference of the means of the dimensions.
        std_difference: the same of their standard deviations.
        frechet: Fréchet distance to the finer targets, as a part of their variance.
        finite: whether all values are finite.
        accepted: whether the gate lets them pass.
        reasons: why not.
    """

    round_trip_error: float
    finer_difference: float
    mean_difference: float
    std_difference: float
    frechet: float
    finite: bool
    accepted: bool
    reasons: tuple[str, ...] = ()

    def require(self) -> None:
        """Raise PairQualityError with the reasons unless the pairs are accepted."""
        if not self.accepted:
            raise PairQualityError(f"the pairs are not good enough: {'; '.join(self.reasons)}")


@torch.no_grad()
def check_pairs(
    model: FlowModel,
    pairs: PairStore | Pairs,
    *,
    solver: Any = None,
    steps: int | Sequence[float] | None = None,
    gate: PairGate | None = None,
    field: Any = None,
    batch_size: int = 1024,
) -> PairQuality:
    """Compare pairs with what their teacher does in finer steps, and back.

    Run it before training on pairs that someone else made, or to choose a number of steps;
    `generate_pairs` does so by itself. The distances are to the same field in finer steps, so
    they measure the solver, not the teacher.

    Args:
        model: the teacher.
        pairs: a store, of which evenly spaced pairs are looked at, or pairs at hand.
        solver: the solver that made them; the store knows its own.
        steps: its steps or grid; the store knows its own.
        gate: what is accepted.
        field: the guided field that made them, if it was not the teacher itself.
        batch_size: pairs computed together.

    Raises:
        ValueError: solver or steps are neither given nor known, or no positive batch size.

    Example:
        >>> model = FlowModel(lambda x, t: torch.ones_like(x))
        >>> source = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> check_pairs(model, Pairs(source, source + 1), solver="euler", steps=1).accepted
        True
    """
    positive("batch_size", batch_size)
    gate = gate if gate is not None else PairGate()
    if isinstance(pairs, PairStore):
        settings = pairs.settings
        solver = solver if solver is not None else solver_of(settings.solver)
        steps = steps if steps is not None else settings.times
        rows = torch.linspace(0, len(pairs) - 1, min(gate.pairs, len(pairs))).long()
        pairs = Pairs(*pairs.rows(rows))
    if solver is None or steps is None:
        raise ValueError("give the solver and the steps that made the pairs")
    source, target = pairs.source[: gate.pairs].cpu(), pairs.target[: gate.pairs].cpu()
    if source.shape[0] < 2:
        raise ValueError(f"two pairs or more can be checked, got {source.shape[0]}")
    device, grid = device_of(model), time_grid(steps)
    teacher = field if field is not None else model
    starts: list[Tensor] = []
    backs: list[Tensor] = []
    finer: list[Tensor] = []
    with evaluating(model):
        for begin in range(0, source.shape[0], batch_size):
            part = slice(begin, min(begin + batch_size, source.shape[0]))
            rows = condition_rows(pairs.condition, part, len(pairs.source))
            given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in rows.items()}
            start = model.path.start(source[part].to(device))
            end = target[part].to(device)
            back = integrate(teacher, end, grid[::-1], solver, **given)
            fine = integrate(teacher, start, _refined(grid, gate.finer), _finer(solver), **given)
            for kept, found in ((starts, start), (backs, back), (finer, fine)):
                kept.append(found.cpu())
    start = torch.cat(starts)
    # On the CPU: not every accelerator has float64.
    return _judge(source, (torch.cat(backs) - start) / start.std(), target, torch.cat(finer), gate)


def _judge(
    source: Tensor, lost: Tensor, target: Tensor, finer: Tensor, gate: PairGate
) -> PairQuality:
    """The numbers and the verdict."""
    finite = all(bool(torch.isfinite(x).all()) for x in (source, target))
    if not finite:
        bad = int((~torch.isfinite(target).flatten(1).all(1)).sum())
        reason = f"{bad} of {target.shape[0]} targets are not finite: check the teacher's weights"
        nan = float("nan")
        return PairQuality(nan, nan, nan, nan, nan, False, False, (reason,))
    a, b = target.flatten(1).double(), finer.flatten(1).double()
    variance = float(b.var(0).mean())
    scale = max(variance, 1e-12) ** 0.5
    found = {
        "round_trip": float(lost.double().flatten(1).square().mean(1).sqrt().median()),
        "difference": _rms(a - b) / scale,
        "mean": _rms(a.mean(0) - b.mean(0)) / scale,
        "std": _rms(a.std(0) - b.std(0)) / scale,
        "frechet": frechet_distance(a, b) / (max(variance, 1e-12) * a.shape[1]),
    }
    asked = {
        "round_trip": ("the round trip to the noise and back misses by", gate.round_trip),
        "difference": ("targets differ from a finer solver's by", gate.difference),
        "mean": ("means differ from a finer solver's by", gate.moments),
        "std": ("standard deviations differ from a finer solver's by", gate.moments),
        "frechet": ("the Fréchet distance to a finer solver's targets is", gate.frechet),
    }
    reasons = [
        f"{text} {found[name]:.3g} (at most {limit:g})"
        for name, (text, limit) in asked.items()
        if not found[name] <= limit
    ]
    if reasons:
        reasons[-1] += ", so take more steps or solver='dopri5'"
    return PairQuality(
        found["round_trip"],
        found["difference"],
        found["mean"],
        found["std"],
        found["frechet"],
        finite=finite,
        accepted=not reasons,
        reasons=tuple(reasons),
    )


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of as many samples.

    `|mean_a - mean_b|² + tr(A + B - 2 sqrt(AB))`. The trace of the root is the sum of the singular
    values of the samples' n x n product, so large images cost no d x d decomposition.
    """
    u, v = a - a.mean(0), b - b.mean(0)
    cross = torch.linalg.svdvals(u @ v.T).sum()
    spread = (u.square().sum() + v.square().sum() - 2 * cross) / (a.shape[0] - 1)
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + spread))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _refined(grid: Sequence[float], factor: int) -> list[float]:
    """The grid with each interval cut into `factor` equal ones."""
    points = [
        start + (stop - start) * part / factor
        for start, stop in itertools.pairwise(grid)
        for part in range(factor)
    ]
    return [*points, grid[-1]]


def _finer(solver: Any) -> Any:
    """The reference's solver: the same on the finer grid, or adaptive with tighter errors."""
    from dataclasses import replace

    from rectiflow.flows.adaptive import DormandPrince
    from rectiflow.flows.solvers import resolve

    solver = resolve(solver)
    if isinstance(solver, DormandPrince):
        return replace(solver, rtol=solver.rtol / 10, atol=solver.atol / 10)
    return solver
