"""Opposing signals: small groups of samples whose losses swing against each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.diagnose import opposing_page
from rectiflow.diagnose.eigenpairs import Eigenpair, top_eigenpair
from rectiflow.diagnose.groups import (
    Groups,
    alternation,
    extremes,
    group_size,
    label_counts,
    matched_groups,
    random_groups,
    shuffled,
)
from rectiflow.diagnose.hessian import Hessian
from rectiflow.diagnose.probes import Probe, chunks, mean_loss, rate_of, sample_losses, trained
from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class OpposingReport:
    """What a step did to the samples of a probe; gradients and curvature are those after it.

    Attributes:
        step: number of the step.
        loss: mean loss after it.
        change: how much that rose by it.
        loss_plus: mean loss of the group whose losses rose most, G+.
        loss_minus: mean loss of the group whose losses fell most, G-.
        change_plus: how much that of G+ rose.
        change_minus: how much that of G- rose (it is negative as a rule).
        share: the part of all absolute changes that both groups carry.
        swapped: the part of G+ that was in G- one step before: near 1 where the groups swing. None
            where too few steps before were seen.
        change_quantiles: the changes of all samples at `QUANTILES`.
        cos_pm: cosine of the groups' mean gradients. Near -1 they oppose each other.
        cos_rand: the same of two random groups that both have the label mix of G+ and G- together,
            on average over several.
        cos_labels: the same of random groups of which one has the label mix of G+ and the other
            that of G-: how far labels alone explain the opposition.
        cos_matched: the same of other samples with the same losses; None where there are too few.
        norm_ratio: mean length of the groups' gradients over that of the groups of `cos_rand`.
        cancellation: length of the sum of both gradients over the sum of lengths; 0 if they cancel.
        sharpness: largest eigenvalue of the Hessian of the mean loss.
        eta_lambda: learning rate times sharpness. Plain descent is stable below 2, with momentum b
            below 2 (1 + b).
        proj_plus: cosine of G+'s gradient and the sharpest direction.
        proj_minus: the same of G-. Opposing groups have opposite signs.
        curvature_plus: curvature of G+'s mean loss along the sharpest direction.
        curvature_minus: the same of G-.
        idx_plus: numbers of the samples of G+, the most moved first.
        idx_minus: those of G-.
        label_counts: how many of which label, of `plus` and of `minus`.
    """

    step: int
    loss: float
    change: float
    loss_plus: float
    loss_minus: float
    change_plus: float
    change_minus: float
    share: float
    swapped: float | None
    change_quantiles: tuple[float, ...]
    cos_pm: float
    cos_rand: float
    cos_labels: float
    cos_matched: float | None
    norm_ratio: float
    cancellation: float
    sharpness: float | None
    eta_lambda: float | None
    proj_plus: float | None
    proj_minus: float | None
    curvature_plus: float | None
    curvature_minus: float | None
    idx_plus: tuple[int, ...]
    idx_minus: tuple[int, ...]
    label_counts: Mapping[str, Mapping[int, int]]


class OpposingSignals:
    """Finds the groups of samples that steer training, by what single steps do to their losses.

    Natural data have pairs of small groups that share a large feature and want opposite things of
    it. Their gradients nearly cancel, and together make the sharpest direction there is: past the
    edge of stability the weights swing along it, one group's loss rises while the other's falls,
    and the total loss spikes. Before that edge nothing of the kind is to be seen, so look at
    `eta_lambda` first. Samples that move much always have large gradients, and groups of different
    labels often disagree; what is found counts as far as it differs from the controls, `cos_rand`,
    `cos_labels` and `cos_matched`.

    Call `observe` after every training step: losses are needed after consecutive ones. A report
    costs a pass over the probe for these, a few over the groups, and some five Hessian products. It
    changes nothing in the training.

    Args:
        probe: the samples.
        every: steps between reports.
        on_rise: also report every step after which the probe's loss is higher than before; this
            costs a forward pass over the probe a step.
        size: samples a group; half a percent of the probe, but at least 10, by default. Large
            groups mix several features.
        window: changes over which groups are chosen: 1 for the last step's, more for the
            alternating part of so many.
        sharpness: compute sharpness, and what is measured along the sharpest direction.
        controls: pairs of random groups of each kind to compare with.
        batch_size: samples of the probe at once; all by default.
        batch_statistics: let batch normalisation use the probe's statistics; all samples go at
            once.
        seed: of controls and of the first direction.

    Attributes:
        steps: the steps after which losses were taken.
        losses: the losses of all samples after each of them.

    Raises:
        ValueError: numbers that are not positive; groups that are more than half of the probe.

    Example:
        >>> from rectiflow.diagnose import SampleProbe
        >>> model = torch.nn.Linear(2, 2)
        >>> probe = SampleProbe(model, torch.randn(8, 2), torch.arange(8) % 2)
        >>> opposing = OpposingSignals(probe, every=1, size=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in (1, 2):
        ...     optimizer.zero_grad()
        ...     probe.losses(torch.arange(8)).mean().backward()
        ...     optimizer.step()
        ...     report = opposing.observe(step, optimizer)
        >>> len(report.idx_plus), report.eta_lambda < 2
        (2, True)

    Source: arXiv 2311.04163, section 2; the measures and controls are ours, since the paper shows
        groups by eye.
    """

    name: ClassVar[str] = "opposing-signals"

    def __init__(
        self,
        probe: Probe,
        *,
        every: int = 100,
        on_rise: bool = False,
        size: int | None = None,
        window: int = 1,
        sharpness: bool = True,
        controls: int = 4,
        batch_size: int | None = None,
        batch_statistics: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("window", window), ("controls", controls)):
            positive(name, value)
        self.probe, self.every, self.on_rise = probe, every, on_rise
        self.size = group_size(len(probe)) if size is None else size
        extremes(torch.zeros(len(probe)), self.size)
        self.window, self.sharpness, self.controls = window, sharpness, controls
        self.batch_size = None if batch_statistics else batch_size
        self.batch_statistics, self.seed = batch_statistics, seed
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self._recent: deque[Tensor] = deque(maxlen=window + 2)
        self._direction: Tensor | None = None

    def observe(self, step: int, optimizer: Any = None) -> OpposingReport | None:
        """Look at the model after a training step.

        Args:
            step: number of the step, counted up one by one.
            optimizer: what took the step; its learning rate is that of `eta_lambda`.

        Returns:
            a report of steps that are due, as soon as enough steps before them were seen; None
            where losses or gradients are not finite.
        """
        # One step more than the window needs, to see whether groups swap sides.
        if not (self.on_rise or -step % self.every <= self.window + 1):
            return None
        if not self.steps or step != self.steps[-1] + 1:
            self._recent.clear()
        losses = sample_losses(
            self.probe, batch_size=self.batch_size, batch_statistics=self.batch_statistics
        )
        self.steps.append(step)
        self.losses.append(losses.float().cpu())
        self._recent.append(losses)
        if len(self._recent) <= self.window:
            return None
        rose = self.on_rise and bool(losses.mean() > self._recent[-2].mean())
        if not rose and step % self.every:
            return None
        return self._report(step, torch.stack(list(self._recent)), rate_of(optimizer))

    def history(self, group: Sequence[int]) -> list[float]:
        """The mean loss of some samples after each step in `steps`, past and future alike."""
        return [float(losses[list(group)].mean()) for losses in self.losses]

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[Path, str]:
        """Plots of reports and a sheet of the samples found; file to caption."""
        return opposing_page.draw(rows, self, folder)

    def _report(self, step: int, losses: Tensor, rate: float | None) -> OpposingReport | None:
        if not bool(losses.isfinite().all()):
            return None
        before, after = losses[-2], losses[-1]
        change = after - before
        groups = extremes(alternation(losses[-1 - self.window :]), self.size)
        swapped = None
        if len(losses) > self.window + 1:
            fell = extremes(alternation(losses[:-1]), self.size).minus
            swapped = float(torch.isin(groups.plus, fell).double().mean())
        rising, falling = self._of_group(groups.plus), self._of_group(groups.minus)
        plus, minus = rising.gradient(), falling.gradient()
        if not bool((plus + minus).isfinite().all()):
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        labels, count = self.probe.labels, len(self.probe)
        random, alike = [], []
        for _ in range(self.controls):
            mixed = shuffled(groups, generator)
            random.append(self._control(mixed, generator))
            alike.append(self._control(groups, generator))
        matched = None
        if 4 * self.size <= count:
            matched = cosine(*self._gradients(matched_groups(groups, before)))
        lengths = [float(g.norm()) for pair in random for g in pair]
        both = float(plus.norm()) + float(minus.norm())
        usual = 2 * sum(lengths) / len(lengths)
        moved = float(change.abs().sum())
        top = self._sharpest() if self.sharpness else None
        spread = torch.tensor(QUANTILES, dtype=change.dtype, device=change.device)
        return OpposingReport(
            step=step,
            loss=float(after.mean()),
            change=float(after.mean() - before.mean()),
            loss_plus=float(after[groups.plus].mean()),
            loss_minus=float(after[groups.minus].mean()),
            change_plus=float(change[groups.plus].mean()),
            change_minus=float(change[groups.minus].mean()),
            share=float(change[groups.members].abs().sum()) / moved if moved else 0.0,
            swapped=swapped,
            change_quantiles=tuple(change.quantile(spread).tolist()),
            cos_pm=cosine(plus, minus),
            cos_rand=sum(cosine(*pair) for pair in random) / len(random),
            cos_labels=sum(cosine(*pair) for pair in alike) / len(alike),
            cos_matched=matched,
            norm_ratio=both / usual if usual else 0.0,
            cancellation=float((plus + minus).norm()) / both if both else 0.0,
            sharpness=None if top is None else top.value,
            eta_lambda=None if top is None or rate is None else rate * top.value,
            proj_plus=None if top is None else cosine(plus, top.vector),
            proj_minus=None if top is None else cosine(minus, top.vector),
            curvature_plus=None if top is None else along(rising, top.vector),
            curvature_minus=None if top is None else along(falling, top.vector),
            idx_plus=tuple(groups.plus.tolist()),
            idx_minus=tuple(groups.minus.tolist()),
            label_counts={
                "plus": label_counts(groups.plus, labels),
                "minus": label_counts(groups.minus, labels),
            },
        )

    def _control(self, groups: Groups, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Gradients of random groups that have the labels of these."""
        labels, count = self.probe.labels, len(self.probe)
        return self._gradients(random_groups(groups, labels, count, generator=generator))

    def _gradients(self, groups: Groups) -> tuple[Tensor, Tensor]:
        return self._of_group(groups.plus).gradient(), self._of_group(groups.minus).gradient()

    def _hessian(self, loss: Any, batches: Sequence[Any]) -> Hessian:
        return Hessian(
            loss,
            trained(self.probe),
            batches,
            module=self.probe.model,
            batch_statistics=self.batch_statistics,
        )

    def _of_group(self, group: Int[Tensor, " k"]) -> Hessian:
        """The Hessian, and with it the gradient, of a group's mean loss."""
        if not self.batch_statistics:
            return self._hessian(lambda batch: self.probe.losses(batch).mean(), [group])
        # Samples of a batch meet: all go through the model, and the group is chosen afterwards.
        return self._hessian(
            lambda batch: self.probe.losses(batch)[group].mean(), [torch.arange(len(self.probe))]
        )

    def _sharpest(self) -> Eigenpair:
        """The sharpest direction, sought from the one before and turned to the same side."""
        batches = chunks(self.probe, self.batch_size)
        hessian = self._hessian(mean_loss(self.probe, batches), batches)
        generator = torch.Generator(hessian.device).manual_seed(self.seed)
        start = self._direction
        top = top_eigenpair(hessian, start=start, steps=20, tolerance=1e-2, generator=generator)
        if start is not None and float(start @ top.vector) < 0:
            top = Eigenpair(top.value, -top.vector, top.residual, top.products)
        self._direction = top.vector
        return top


def cosine(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Cosine of two flat vectors, 0 if one of them is zero.

    Example:
        >>> cosine(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.0]))
        -1.0
    """
    lengths = float(a.norm()) * float(b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def along(hessian: Hessian, direction: Float[Tensor, " n"]) -> float:
    """Curvature along a direction of length 1."""
    return float(direction @ (hessian @ direction))
