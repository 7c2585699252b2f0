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
from rectiflow.flows.metrics import straightness
from rectiflow.flows.pair_store import PairStore
from rectiflow.flows.sampling import condition_rows, sample
from rectiflow.training.figures import curves

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Profile:
    """One flow, measured over time.

    Attributes:
        times: middles of equal bins of [0, 1].
        loss: squared error of the velocity on the pairs it was trained for, a dimension, by bin.
        gap: variance of the velocity along trajectories, a dimension, by bin; 0 where straight.
        straightness: the mean of `gap` over time: S a dimension.
        one_step: root mean square distance of one Euler step from many, as a part of the spread of
            the samples: what is left to gain.
        missed: the same distance of the many steps from the pairs' targets: what a round of
            training on pairs gets wrong. No meaning on independent pairs.
        steps: how many "many" are.
        rounds: rounds of reflow behind the model.
    """

    times: tuple[float, ...]
    loss: tuple[float, ...]
    gap: tuple[float, ...]
    straightness: float
    one_step: float
    missed: float
    steps: int
    rounds: int


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
            f"S fell from {before.straightness:.3g} to {after.straightness:.3g} a dimension; one "
            f"step now differs from {after.steps} by {after.one_step:.1%} of the samples' spread "
            f"({before.one_step:.1%} before), and training missed its pairs by {after.missed:.1%}"
        )
        if after.rounds >= MOST_ROUNDS:
            return f"{found}: {after.rounds} rounds are done, distil instead of reflowing again."
        if self.another_round:
            return f"{found}: another round would help."
        return f"{found}: another round would add more error than it removes, distil instead."

    def rows(self) -> list[list[float]]:
        """Time, losses before and after, gaps before and after, by bin; for a report's table."""
        both = (self.before.loss, self.after.loss, self.before.gap, self.after.gap)
        return [list(row) for row in zip(self.before.times, *both)]

    def draw(self, folder: Path | str) -> dict[Path, str]:
        """Draw loss and gap over time into a folder; returns files with their captions."""
        folder, made = Path(folder), {}
        for name, title in (("loss", "flow-matching loss"), ("gap", "variance of the velocity")):
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
    before: FlowModel, after: FlowModel, pairs: Pairs, folder: Path | str, *, steps: int = 20
) -> Straightening:
    """Measure a flow before and after a round on the same pairs; numbers and pictures in a folder.

    Args:
        before: the teacher.
        after: its student.
        pairs: pairs of the teacher, best ones that the training did not see.
        folder: gets `straightening.json`, `straightening-loss.png` and `straightening-gap.png`.
        steps: Euler steps of the careful samples.
    """
    count = len(pairs.source)
    found = Straightening(
        profile(before, pairs, steps=steps, count=count),
        profile(after, pairs, steps=steps, count=count),
    )
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
) -> Profile:
    """Measure a flow on the pairs it was trained for.

    Args:
        model: the flow.
        pairs: a store, of which evenly spaced pairs are taken, or pairs at hand; best ones that
            the training did not see. For a first flow, noise with data.
        bins: bins of time.
        steps: Euler steps of the careful samples; rounded up to a multiple of the bins.
        count: pairs taken.

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
    size = source[0].numel()
    bent = straightness(model, source, steps, **condition)
    made = {
        n: sample(model, source=source, steps=n, solver="euler", **condition) for n in (1, steps)
    }
    many = made[steps].flatten(1).double()
    spread = max(float((many - many.mean(0)).square().mean().sqrt()), 1e-12)

    def distance(other: Tensor) -> float:
        return float((many - other.flatten(1).double()).square().mean().sqrt()) / spread

    return Profile(
        times=tuple((i + 0.5) / bins for i in range(bins)),
        loss=tuple(loss_by_time(model, source, target, bins, **condition).tolist()),
        gap=tuple((bent.per_time.reshape(bins, -1).mean(1) / size).tolist()),
        straightness=bent.per_dimension,
        one_step=distance(made[1]),
        missed=distance(target),
        steps=steps,
        rounds=reflow_rounds(model),
    )


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
    total = torch.zeros(bins, dtype=torch.float64, device=source.device)
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
                total[index] += wrong.double().square().sum()
    return total / source.numel()
