"""One report for straightening: what a round of reflow changed, and whether another would help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rectiflow.distill.reflow import MOST_ROUNDS, reflow_rounds
from rectiflow.errors import positive
from rectiflow.files import write_json
from rectiflow.flows.couplings import Pairs
from rectiflow.flows.fields import FlowModel, device_of, evaluating
from rectiflow.flows.metrics import first_order_gap, straightness
from rectiflow.flows.pair_store import PairStore
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.sampling import condition_rows, sample
from rectiflow.training.figures import curves

if TYPE_CHECKING:
    from jaxtyping import Float

GAP = "the first-order gap"


@dataclass(frozen=True)
class Profile:
    """One flow, measured over time.

    Attributes:
        times: middles of equal bins of [0, 1].
        loss: squared error of the velocity on the pairs it was trained for, a dimension, by bin.
        gap: variance of the velocity along trajectories, a dimension, by bin; 0 where straight. On
            a curved path that of the noise estimate: the first-order gap.
        straightness: the mean of `gap` over time: S a dimension, or the whole first-order gap.
        one_step: root mean square distance of one step from many, as a part of the spread of the
            samples: what is left to gain. Steps are Euler's, on a curved path first-order ones.
        missed: the same distance of the many steps from the pairs' targets: what a round of
            training on pairs gets wrong. No meaning on independent pairs.
        steps: how many "many" are.
        rounds: rounds of reflow behind the model.
        measure: what `straightness` is: "S" or "the first-order gap".
    """

    times: tuple[float, ...]
    loss: tuple[float, ...]
    gap: tuple[float, ...]
    straightness: float
    one_step: float
    missed: float
    steps: int
    rounds: int
    measure: str = "S"


@dataclass(frozen=True)
class Straightening:
    """A flow before and after a round of reflow."""

    before: Profile
    after: Profile

    @property
    def another_round(self) -> bool:
        """Whether one more round would help.

        Reflow can at best remove the distance between one step and many, and it adds the error
        with which a round reproduces its pairs. So it pays while the first is the larger one, and
        for three rounds at most.
        """
        return self.after.rounds < MOST_ROUNDS and self.after.one_step > self.after.missed

    @property
    def sentence(self) -> str:
        """The finding in words."""
        before, after = self.before, self.after
        found = (
            f"{self._change} a dimension; one step now differs from {after.steps} by "
            f"{after.one_step:.1%} of the samples' spread ({before.one_step:.1%} before), and "
            f"training missed its pairs by {after.missed:.1%}"
        )
        if after.rounds >= MOST_ROUNDS:
            return f"{found}: {after.rounds} rounds are done, distil instead of reflowing again."
        if self.another_round:
            return f"{found}: another round would help."
        return f"{found}: another round would add more error than it removes, distil instead."

    @property
    def _change(self) -> str:
        """How the measure changed."""
        before, after = self.before, self.after
        if before.measure != after.measure:
            return (
                f"{before.measure} was {before.straightness:.3g} and {after.measure} is "
                f"{after.straightness:.3g}"
            )
        moved = "rose" if after.straightness > before.straightness else "fell"
        return f"{after.measure} {moved} from {before.straightness:.3g} to {after.straightness:.3g}"

    def rows(self) -> list[list[float]]:
        """Time, losses before and after, gaps before and after, by bin; for a report's table."""
        both = (self.before.loss, self.after.loss, self.before.gap, self.after.gap)
        return [list(row) for row in zip(self.before.times, *both)]

    def draw(self, folder: Path | str) -> dict[Path, str]:
        """Draw loss and gap over time into a folder; returns files with their captions."""
        folder, made = Path(folder), {}
        measures = {"S": "variance of the velocity", GAP: "first-order gap"}
        gaps = dict.fromkeys(measures[one.measure] for one in (self.before, self.after))
        for name, title in (("loss", "flow-matching loss"), ("gap", ", then ".join(gaps))):
            lines = {
                arm: (profile.times, getattr(profile, name))
                for arm, profile in (("before", self.before), ("after", self.after))
            }
            drawn = curves(
                lines,
                folder / f"straightening-{name}.png",
                across="time t (0 noise, 1 data)",
                up=f"{title}, a dimension",
            )
            means = [sum(values) / len(values) for _, values in lines.values()]
            made[drawn] = (
                f"{title.capitalize()} over time: {means[0]:.3g} on average before the round, "
                f"{means[1]:.3g} after."
            )
        return made


def straightened(
    before: FlowModel,
    after: FlowModel,
    pairs: Pairs,
    folder: Path | str,
    *,
    steps: int = 20,
    batch_size: int = 1024,
) -> Straightening:
    """Measure a flow before and after a round on the same pairs; numbers and pictures in a folder.

    Args:
        before: the teacher.
        after: its student.
        pairs: pairs of the teacher, best ones that the training did not see.
        folder: gets `straightening.json`, `straightening-loss.png` and `straightening-gap.png`.
        steps: steps of the careful samples.
        batch_size: pairs computed together.
    """
    options = {"steps": steps, "count": len(pairs.source), "batch_size": batch_size}
    found = Straightening(profile(before, pairs, **options), profile(after, pairs, **options))
    facts = {"sentence": found.sentence, "another_round": found.another_round, **asdict(found)}
    write_json(Path(folder) / "straightening.json", facts)
    found.draw(folder)
    return found


@torch.no_grad()
def profile(
    model: FlowModel,
    pairs: PairStore | Pairs,
    *,
    bins: int = 10,
    steps: int = 50,
    count: int = 1024,
    batch_size: int = 1024,
) -> Profile:
    """Measure a flow on the pairs it was trained for.

    Args:
        model: the flow.
        pairs: a store, of which evenly spaced pairs are taken, or pairs at hand; best ones that
            the training did not see. For a first flow, noise with data.
        bins: bins of time.
        steps: steps of the careful samples; rounded up to a multiple of the bins.
        count: pairs taken.
        batch_size: pairs computed together.

    Raises:
        ValueError: no pairs, or a number that is not positive.

    Example:
        >>> z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> found = profile(FlowModel(lambda x, t: torch.ones_like(x)), Pairs(z, z + 1), steps=10)
        >>> max(found.loss) < 1e-9 and found.one_step < 1e-6
        True
    """
    for name, value in (("bins", bins), ("steps", steps), ("count", count)):
        positive(name, value)
    positive("batch_size", batch_size)
    if isinstance(pairs, PairStore):
        rows = torch.linspace(0, len(pairs) - 1, min(count, len(pairs))).long()
        pairs = Pairs(*pairs.rows(rows))
    device = device_of(model)
    source, target = pairs.source[:count].to(device), pairs.target[:count].to(device)
    if len(source) < 2:
        raise ValueError(f"a profile needs two pairs or more, got {len(source)}")
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in pairs.condition.items()}
    condition = condition_rows(given, slice(0, count), len(pairs.source))
    steps = -(-steps // bins) * bins
    made = {}
    for n in (1, steps):
        made[n] = sample(
            model,
            source=source,
            steps=n,
            solver=careful_solver(model),
            batch_size=batch_size,
            **condition,
        ).cpu()
    # In float64 on the CPU: not every accelerator has it.
    many = made[steps].flatten(1).double()
    spread = max(float((many - many.mean(0)).square().mean().sqrt()), 1e-12)
    curved = not isinstance(model.path, RectifiedPath)
    gap, whole = _gap(model, source, steps, bins, batch_size, condition, curved=curved)
    loss = loss_by_time(model, source, target, bins, batch_size=batch_size, **condition)

    def distance(other: Tensor) -> float:
        return float((many - other.cpu().flatten(1).double()).square().mean().sqrt()) / spread

    return Profile(
        times=tuple((i + 0.5) / bins for i in range(bins)),
        loss=tuple(loss.tolist()),
        gap=gap,
        straightness=whole,
        one_step=distance(made[1]),
        missed=distance(target),
        steps=steps,
        rounds=reflow_rounds(model),
        measure=GAP if curved else "S",
    )


def careful_solver(model: FlowModel) -> str:
    """The solver whose one step is exact once a flow is straightened, on the model's path.

    Example:
        >>> careful_solver(FlowModel(lambda x, t: x))
        'euler'
    """
    return "euler" if isinstance(model.path, RectifiedPath) else "first-order"


def _gap(
    model: FlowModel,
    source: Tensor,
    steps: int,
    bins: int,
    batch_size: int,
    condition: dict[str, Any],
    *,
    curved: bool,
) -> tuple[tuple[float, ...], float]:
    """How far the flow is from one exact step, a dimension: by bin of time, and on the whole."""
    if curved:
        noise = first_order_gap(model, source, steps, bins=bins, batch_size=batch_size, **condition)
        return tuple(noise.per_time.tolist()), noise.total
    bent = straightness(model, source, steps, batch_size=batch_size, **condition)
    by_bin = bent.per_time.reshape(bins, -1).mean(1) / source[0].numel()
    return tuple(by_bin.tolist()), bent.per_dimension


@torch.no_grad()
def loss_by_time(
    model: FlowModel,
    source: Float[Tensor, "b *dims"],
    target: Float[Tensor, "b *dims"],
    bins: int,
    *,
    batch_size: int = 1024,
    **condition: Any,
) -> Float[Tensor, " bins"]:
    """The mean squared error of the velocity on pairs, a dimension, in equal bins of time.

    Each pair is seen once in every bin, at evenly spread times inside it.

    Example:
        >>> z = torch.zeros(4, 2)
        >>> loss_by_time(FlowModel(lambda x, t: 0 * x), z, z + 2, 2)
        tensor([4., 4.], dtype=torch.float64)
    """
    total = torch.zeros(bins, dtype=torch.float64)
    inside = (torch.arange(len(source), dtype=torch.float64) + 0.5) / len(source)
    with evaluating(model):
        for begin in range(0, len(source), batch_size):
            part = slice(begin, begin + batch_size)
            here, there = source[part], target[part]
            rows = condition_rows(condition, part, len(source))
            for index in range(bins):
                t = ((index + inside[part]) / bins).to(here)
                x = model.path.interpolate(here, there, t)
                wrong = model.velocity(x, t, **rows) - model.path.velocity(here, there, t)
                exact = wrong.to(torch.promote_types(wrong.dtype, torch.float32))
                # Summed up in float64 on the CPU: not every accelerator has it.
                total[index] += exact.square().flatten(1).sum(1).cpu().double().sum()
    return total / source.numel()
