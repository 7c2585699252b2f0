"""Clipping of the few largest coordinates of a gradient, or of a step, at a quantile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._utils import _flatten_dense_tensors

from rectiflow.errors import positive, unknown
from rectiflow.optim.parts import Part, Stretch, Whole, change_gradient

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SCOPES = ("global", "group", "tensor")
PLACES = ("gradient", "momentum", "update")
# Elements of which a sample is sorted to find where the threshold must lie.
SAMPLE = 65_536
# Where groups keep the logarithm of their threshold, and for how many steps they did.
MEMORY, AGE = "clip_log_threshold", "clip_steps"
# What NumPy knows as well.
NUMPY = (torch.float32, torch.float64)


@torch.no_grad()
def top_threshold(values: Sequence[Float[Tensor, "..."]], fraction: float) -> Float[Tensor, ""]:
    """The `floor(fraction n) + 1`-th largest absolute value of all n numbers.

    Exact, without sorting all of them: a sample says between which two numbers it must lie, and
    only what lies there is looked at closely. With rare bad luck, or NaN, everything is.

    Args:
        values: tensors of any shapes on one device.
        fraction: share of the numbers that lie above, in [0, 1).

    Returns:
        a number of the tensors' dtype; 0 where a fraction above 0 would clip at 0 but some
        numbers are not: see `clip_coordinates_`.

    Raises:
        ValueError: a fraction outside [0, 1), or no numbers.

    Example:
        >>> top_threshold([torch.tensor([3.0, -8.0]), torch.tensor([1.0, 5.0])], 0.25)
        tensor(5.)

    Source: arXiv 2306.00204, section 4: the threshold is taken over all tensors together.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the clipped fraction must be in [0, 1), got {fraction}")
    count = sum(value.numel() for value in values)
    if not count:
        raise ValueError("there is nothing to take a quantile of: give one number or more")
    rank = int(count * fraction)
    if count <= 2 * SAMPLE:
        return _largest(_magnitudes(values), rank)
    found = _bracketed(values, count, rank)
    return found if found is not None else _largest(_magnitudes(values), rank)


def _magnitudes(values: Sequence[Tensor]) -> Tensor:
    return _flatten_dense_tensors(values).abs()


def _largest(magnitudes: Tensor, rank: int) -> Tensor:
    """The number with `rank` larger ones; NaN counts as the largest."""
    if magnitudes.device.type == "cpu" and magnitudes.dtype in NUMPY:
        # NumPy selects, compares and counts on a CPU several times faster than torch.
        place = len(magnitudes) - rank - 1
        return torch.tensor(np.partition(magnitudes.numpy(), place)[place])
    return torch.kthvalue(magnitudes, len(magnitudes) - rank).values


def _bracketed(values: Sequence[Tensor], count: int, rank: int) -> Tensor | None:
    """The threshold by a sample and two passes; None if it lies outside of what the sample says."""
    stride = count // SAMPLE
    # An odd stride meets every place of rows whose length is a power of two.
    sample = torch.cat([value.reshape(-1)[:: stride | 1] for value in values]).abs_()
    middle = len(sample) * rank / count
    # Six standard deviations of the rank of a random sample.
    slack = 6 * (middle * (1 - rank / count)) ** 0.5 + 8
    high = _largest(sample, max(0, int(middle - slack)))
    low = _largest(sample, min(len(sample) - 1, int(middle + slack)))
    parts = [part for value in values for part in value.reshape(-1).split(SAMPLE)]
    near, above = _between(parts, low, high)
    place = rank - above
    if not 0 <= place < len(near) or bool(sample.isnan().any()):
        return None
    return _largest(near, place)


def _between(parts: Sequence[Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, int]:
    """The magnitudes from low to high, and how many are larger."""
    if low.device.type == "cpu" and all(part.dtype in NUMPY for part in parts):
        least, most = low.numpy(), high.numpy()
        found, count = [], 0
        for part in parts:
            size = np.abs(part.detach().to(low.dtype).numpy())
            over = size > most
            count += int(np.count_nonzero(over))
            # What is over is large enough too: they differ in what lies between.
            found.append(size[(size >= least) ^ over])
        return torch.from_numpy(np.concatenate(found)), count
    inside, above = [], torch.zeros((), dtype=torch.int64, device=low.device)
    for part in parts:
        # Next to numbers of one dimension those of none are rounded to their dtype.
        magnitude = part.abs().to(low.dtype)
        above += (magnitude > high).sum()
        inside.append(magnitude[(magnitude >= low) & (magnitude <= high)])
    return torch.cat(inside), int(above)


@torch.no_grad()
def clip_coordinates_(
    params: Iterable[Any] | Tensor,
    fraction: float = 0.1,
    *,
    scope: str = "global",
    threshold_scale: float = 1.0,
) -> Float[Tensor, "..."]:
    """Clip the largest coordinates of gradients in place, as `clip_grad_norm_` clips their norm.

    `sign(g) min(|g|, tau)`, where tau is such that a fraction of all coordinates lies above it.
    Where more than that fraction is all that is not zero (embeddings seen rarely), tau is taken
    over what is not zero.

    Args:
        params: weights whose gradients are clipped, or groups of them such as an optimizer's
            `param_groups`; weights without gradient are left out.
        fraction: share of the coordinates to clip, in [0, 1); 0 clips nothing.
        scope: "global" (one threshold), "group" (one a group) or "tensor" (one each).
        threshold_scale: factor on the threshold.

    Returns:
        the threshold, or one a group or tensor.

    Raises:
        ValueError: a fraction outside [0, 1), an unknown scope, weights without groups for
            "group", a gradient that is not finite.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> weight.grad = torch.tensor([1.0, -2.0, 3.0, -9.0])
        >>> clip_coordinates_(weight, 0.25), weight.grad
        (tensor(3.), tensor([ 1., -2.,  3., -3.]))

    Source: arXiv 2306.00204, section 4.
    """
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    if scope == "group" and any(isinstance(one, torch.Tensor) for one in listed):
        raise ValueError("scope='group' takes groups of weights: give optimizer.param_groups")
    members = [[one] if isinstance(one, torch.Tensor) else one["params"] for one in listed]
    groups = [[p.grad for p in group if p.grad is not None] for group in members]
    grads = [grad for group in groups for grad in group]
    if not grads:
        return torch.zeros(())
    if not math.isfinite(torch.nn.utils.get_total_norm(grads, torch.inf)):
        raise ValueError("gradients are not finite: skip this step, or clip nothing")
    together = {
        "global": [grads],
        "group": [group for group in groups if group],
        "tensor": [[grad] for grad in grads],
    }[scope]
    found = [_threshold(some, fraction) * threshold_scale for some in together]
    if fraction:
        for some, tau in zip(together, found):
            for grad in some:
                bound = tau.to(grad)
                torch.clamp(grad, -bound, bound, out=grad)
    if scope == "global":
        return found[0]
    return torch.stack([tau.to(found[0].device) for tau in found])


def _threshold(values: Sequence[Tensor], fraction: float) -> Tensor:
    """`top_threshold`, over what is not zero where it would be zero itself.

    What is on several devices is brought to the first.
    """
    here = [value.to(values[0].device) for value in values]
    found = top_threshold(here, fraction)
    if found == 0:
        kept = [value[value != 0] for value in here]
        if any(value.numel() for value in kept):
            return top_threshold(kept, fraction)
    return found


def _clamped(values: Tensor, tau: Tensor) -> Tensor:
    """Values in [-tau, tau]."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        # With bounds that are numbers several times faster, and there is no device to wait for.
        bound = tau.item()
        return torch.clamp(values, -bound, bound)
    return torch.clamp(values, -tau, tau)


@dataclass(frozen=True)
class ClipCoordinates(Part):
    """Clips the largest coordinates of what passes through a chain.

    Args:
        fraction: share of the coordinates to clip, in [0, 1); 0 clips nothing.
        scope: over what the threshold is taken: "global" (all weights; not for updates), "group"
            or "tensor".
        where: "gradient"; "momentum" (first moments see the clipped gradient, second moments the
            whole one: the paper's Adam); or "update" (the direction). Thresholds of both gradients
            are those of the whole one.
        threshold_scale: factor on the threshold.
        smoothing: weight of earlier thresholds in a running geometric mean, such as 0.9; 0 takes
            each step's own. For thresholds of gradients over groups; an extension of ours.
        refresh: steps between looks for the quantile where the threshold is smoothed: the search
            costs more than the rest of a step of SGD.

    Raises:
        ValueError: numbers out of range, an unknown scope or place, smoothing of thresholds that
            belong to tensors or updates, refreshing of thresholds that are not smoothed.

    Source: arXiv 2306.00204, algorithms 1 to 4.
    """

    fraction: float = 0.1
    scope: str = "global"
    where: str = "gradient"
    threshold_scale: float = 1.0
    smoothing: float = 0.0
    refresh: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"the clipped fraction must be in [0, 1), got {self.fraction}")
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.where not in PLACES:
            raise unknown("place of clipping", self.where, PLACES)
        if self.where == "update" and self.scope == "global":
            raise ValueError("updates are made group by group: clip them with scope='group'")
        positive("threshold_scale", self.threshold_scale)
        positive("refresh", self.refresh)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if self.smoothing and self.whole:
            raise ValueError(
                "thresholds of single tensors and of updates are not smoothed: take scope='global' "
                "or 'group' and where='gradient' or 'momentum'"
            )
        if self.refresh > 1 and not self.smoothing:
            raise ValueError("only a smoothed threshold outlives its step: give smoothing too")

    @property
    def defaults(self) -> dict[str, Any]:
        return {MEMORY: None, AGE: 0} if self.smoothing else {}

    @property
    def on(self) -> str:  # type: ignore[override]
        return "direction" if self.where == "update" else "gradient"

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return self.where == "update" or self.scope == "tensor"

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.scope == "group"

    @property
    def surveys(self) -> bool:  # type: ignore[override]
        return not self.whole

    def survey(
        self, groups: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
    ) -> Iterable[dict[str, Tensor]]:
        if self.scope == "global":
            every = [grad for _, grads in groups for grad in grads]
            if not every:
                return [{} for _ in groups]
            found = self._kept([group for group, _ in groups], every)
            return [{"clip_above": found} for _ in groups]
        return [{"clip_above": self._kept([group], grads)} for group, grads in groups]

    def _kept(self, groups: Sequence[Mapping[str, Any]], values: Sequence[Tensor]) -> Tensor:
        """The threshold of values that belong to groups, smoothed where that is asked for."""
        if not self.smoothing:
            return self._tau(values)
        memory, age = groups[0][MEMORY], groups[0][AGE]
        if memory is None or age % self.refresh == 0:
            now = _threshold(values, self.fraction).log()
            if memory is not None:
                mixed = self.smoothing * memory.to(now) + (1 - self.smoothing) * now
                # Where all gradients are zero there is nothing to learn.
                now = torch.where(now.isinf(), memory.to(now), mixed)
            memory = now
        for group in groups:
            group[MEMORY], group[AGE] = memory, age + 1  # type: ignore[index]
        return memory.exp() * self.threshold_scale

    def _tau(self, values: Sequence[Tensor]) -> Tensor:
        return _threshold(values, self.fraction) * self.threshold_scale

    def apply(self, stretch: Stretch) -> None:
        if not self.fraction:
            return
        if isinstance(stretch, Whole):
            self._apply_whole(stretch)
            return
        tau = stretch.numbers["clip_above"].to(stretch.gradient)
        if self.where == "momentum":
            stretch.momentum_gradient = _clamped(stretch.momentum_gradient, tau)
        else:
            change_gradient(stretch, lambda gradient: _clamped(gradient, tau))

    def _apply_whole(self, whole: Whole) -> None:
        """Clip by tensor, or the direction of all weights here."""
        source = whole.direction if self.where == "update" else whole.gradient
        spans = [span for span in map(whole.span, whole.indices) if span[1] > span[0]]
        bounds: list[tuple[int, int, Tensor]] = []
        for some in [[span] for span in spans] if self.scope == "tensor" else [spans]:
            tau = self._tau([source[start:stop] for start, stop in some])
            bounds += [(start, stop, tau) for start, stop in some]

        def clipped(values: Tensor) -> Tensor:
            made = values.clone()
            for start, stop, tau in bounds:
                made[start:stop].clamp_(-tau, tau)
            return made

        if self.where == "update":
            whole.direction = clipped(source)
        elif self.where == "momentum":
            whole.momentum_gradient = clipped(whole.momentum_gradient)
        else:
            change_gradient(whole, clipped)
