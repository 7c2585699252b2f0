"""Sophia: steps along a mean of gradients over an estimate of curvature, no longer than one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive, unknown
from rectiflow.optim.buckets import working_dtype
from rectiflow.optim.chained import ChainedOptimizer, Params
from rectiflow.optim.curvature import PROBES, hutchinson
from rectiflow.optim.directions import check_betas
from rectiflow.optim.parts import Direction, Stretch, approach
from rectiflow.vectors.batchwise import wide

if TYPE_CHECKING:
    from torch import Tensor


EPS_MODES = ("max", "add")


@dataclass(frozen=True)
class Sophia(Direction):
    """`clip(m / max(gamma h, eps), 1)`, weight by weight; neither mean is corrected.

    m is a running mean of gradients and h of curvature estimates, which come from outside: see
    `SophiaG` and `SophiaH`. Where h is zero or negative the step is the sign of m, so the first
    steps, before any curvature is known, are sign steps: warm the rate up.

    Args:
        betas: decays of both means.
        gamma: how much curvature counts: larger, and fewer weights are clipped. 10 to 50 % of them
            unclipped (`win_rate`) is what the paper tunes it for.
        eps: least curvature.
        eps_mode: "max" as above, or "add" for `max(gamma h, 0) + eps`, as the official code does.

    Raises:
        ValueError: numbers out of range, an unknown mode.

    Source: arXiv 2305.14342, algorithm 3.
    """

    betas: tuple[float, float] = (0.96, 0.99)
    gamma: float = 0.01
    eps: float = 1e-12
    eps_mode: str = "max"
    slots = ("exp_avg", "hessian")

    def __post_init__(self) -> None:
        if self.eps_mode not in EPS_MODES:
            raise unknown("eps mode", self.eps_mode, EPS_MODES)

    @property
    def defaults(self) -> dict[str, Any]:
        return {"betas": self.betas, "gamma": self.gamma, "eps": self.eps}

    def check(self, group: Mapping[str, Any]) -> None:
        check_betas(group["betas"])
        positive("gamma", group["gamma"])
        positive("eps", group["eps"])

    def numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        return {
            "first": 1 - float(group["betas"][0]),
            "gamma": float(group["gamma"]),
            "eps": float(group["eps"]),
        }

    def apply(self, stretch: Stretch) -> None:
        mean = stretch.state["exp_avg"]
        approach(mean, stretch.momentum_gradient, stretch.numbers["first"])
        curvature = stretch.state["hessian"] * stretch.numbers["gamma"]
        if self.eps_mode == "add":
            curvature = curvature.clamp_(min=0) + stretch.numbers["eps"]
        else:
            curvature = curvature.clamp_(min=stretch.numbers["eps"])
        stretch.direction = (mean / curvature).clamp_(-1, 1)


class _SophiaOptimizer(ChainedOptimizer):
    """What both forms share: the running mean of curvature and when it is due."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        betas: tuple[float, float],
        gamma: float,
        eps: float,
        eps_mode: str,
        weight_decay: float,
        interval: int,
        maximize: bool,
        compile: bool,
    ) -> None:
        positive("interval", interval)
        super().__init__(
            params,
            [Sophia(betas, gamma, eps, eps_mode)],
            lr=lr,
            weight_decay=weight_decay,
            maximize=maximize,
            compile=compile,
        )
        for settings in (self.defaults, *self.param_groups):
            settings.setdefault("interval", interval)
            settings.setdefault("taken", 0)

    @property
    def due(self) -> bool:
        """Whether the curvature should be refreshed before the next step: every `interval`."""
        first = self.param_groups[0]
        return first["taken"] % first["interval"] == 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see `ChainedOptimizer`."""
        found = super().step(closure)
        for group in self.param_groups:
            group["taken"] += 1
        return found

    @torch.no_grad()
    def win_rate(self) -> float:
        """The share of weights whose next step would not be clipped: 0.1 to 0.5 is aimed at."""
        inside = count = 0
        for group in self.param_groups:
            for p in group["params"]:
                if "hessian" in self.state.get(p, {}):
                    state = self.state[p]
                    kept = state["exp_avg"].abs() < group["gamma"] * state["hessian"]
                    inside, count = inside + kept.sum(), count + p.numel()
        return float(inside) / count if count else 0.0

    def _trained(self) -> list[Tensor]:
        """All weights that the curvature is asked of."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @torch.no_grad()
    def _average(self, estimates: Sequence[Tensor | None]) -> None:
        """Move the running mean of curvature toward estimates; None leaves a weight's alone."""
        by_param = dict(zip(map(id, self._trained()), estimates))
        for number, group in enumerate(self.param_groups):
            self._buckets_of(number, group)
            for p in group["params"]:
                found = by_param.get(id(p))
                if found is not None:
                    mean = self.state[p]["hessian"]
                    mean.lerp_(found.to(mean.dtype), 1 - float(group["betas"][1]))


class SophiaG(_SophiaOptimizer):
    """Sophia with the Gauss-Newton-Bartlett estimate of curvature.

    `refresh` takes a closure that returns a loss on labels drawn from the model itself and how many
    were drawn: `sampled_cross_entropy(logits)`, or `sampled_squared_error(output)` for regression
    and flow matching. Call it when `due`, before `step`:

        if optimizer.due:
            with statistics_kept(model):
                optimizer.refresh(lambda: sampled_cross_entropy(model(x)))

    `statistics_kept` gives running statistics (batch normalisation) back as they were.

    The learning rate is the largest change of a weight in a step: that of Lion times 3 to 5. Warm
    it up, since the first steps are sign steps. Re-tests find less than the paper: after equal
    tuning AdamW was as good at 125 M parameters.

    With `empirical_fisher(logits, labels)` in the closure the labels are those of the data: cheaper
    by a draw, and another matrix, so no longer Sophia.

    Args:
        params: weights or groups.
        lr: learning rate.
        betas: decays of the gradient's and of the curvature's mean.
        gamma: see `Sophia`. The official code's `rho`, if its `bs` is the number of labels.
        eps: least curvature.
        eps_mode: see `Sophia`.
        weight_decay: decoupled weight decay.
        interval: steps between refreshes.
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Source: arXiv 2305.14342, algorithms 2 and 3, table of defaults.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        eps_mode: str = "max",
        weight_decay: float = 0.2,
        interval: int = 10,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            gamma=gamma,
            eps=eps,
            eps_mode=eps_mode,
            weight_decay=weight_decay,
            interval=interval,
            maximize=maximize,
            compile=compile,
        )

    def refresh(
        self,
        *closures: Callable[[], tuple[Tensor, int]],
        clip_norm: float | None = None,
    ) -> None:
        """Refresh the curvature by the squared gradient of losses on drawn labels.

        Gradients of several micro-batches, and of all processes, are averaged before they are
        squared. `p.grad` is not touched.

        Args:
            *closures: one a micro-batch: the mean loss over draws, and their number.
            clip_norm: clip the norm of the averaged gradient first, as the official loop does; it
                makes the curvature smaller whenever it acts.

        Raises:
            ValueError: no closure.
        """
        if not closures:
            raise ValueError("refresh needs a closure for each micro-batch, got none")
        params = self._trained()
        total: list[Tensor | None] = [None] * len(params)
        draws = 0
        for closure in closures:
            with torch.enable_grad():
                loss, count = closure()
                found = torch.autograd.grad(loss, params, allow_unused=True)
            draws += count
            for place, grad in enumerate(found):
                if grad is not None:
                    grad = wide(grad.detach()) * count
                    known = total[place]
                    total[place] = grad if known is None else known.add_(grad)
        draws = _summed(total, draws)
        grads = [None if grad is None else grad / draws for grad in total]
        if clip_norm is not None:
            here = [grad for grad in grads if grad is not None]
            factor = (clip_norm / (torch.nn.utils.get_total_norm(here) + 1e-6)).clamp(max=1)
            grads = [None if grad is None else grad * factor.to(grad) for grad in grads]
        self._average([None if grad is None else draws * grad.square() for grad in grads])


class SophiaH(_SophiaOptimizer):
    """Sophia with Hutchinson's estimate of curvature.

    `refresh` takes a closure that returns the loss with its graph; it costs a second pass
    backward. Call it when `due`, before `step`. Otherwise see `SophiaG`.

    Args:
        params: weights or groups.
        lr: learning rate.
        betas: decays of the gradient's and of the curvature's mean.
        gamma: see `Sophia`.
        eps: least curvature.
        eps_mode: see `Sophia`.
        weight_decay: decoupled weight decay.
        interval: steps between refreshes.
        probe: "rademacher" or "normal" (the paper's).
        samples: random vectors a refresh.
        maximize: go up.
        compile: see `ChainedOptimizer`.

    Source: arXiv 2305.14342, algorithms 1 and 3, table of defaults.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        eps_mode: str = "max",
        weight_decay: float = 0.2,
        interval: int = 10,
        probe: str = "rademacher",
        samples: int = 1,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            gamma=gamma,
            eps=eps,
            eps_mode=eps_mode,
            weight_decay=weight_decay,
            interval=interval,
            maximize=maximize,
            compile=compile,
        )
        if probe not in PROBES:
            raise unknown("probe", probe, PROBES)
        positive("samples", samples)
        self.probe, self.samples = probe, samples

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "probe": self.probe, "samples": self.samples}

    def refresh(
        self, *closures: Callable[[], Tensor], generator: torch.Generator | None = None
    ) -> None:
        """Refresh the curvature by products of the Hessian and random vectors.

        Args:
            *closures: one a micro-batch: the mean loss, with its graph.
            generator: the source of randomness; on the weights' device.

        Raises:
            ValueError: no closure.
        """
        if not closures:
            raise ValueError("refresh needs a closure for each micro-batch, got none")
        params = self._trained()
        total: list[Tensor | None] = [
            torch.zeros_like(p, dtype=working_dtype(p.dtype)) for p in params
        ]
        for closure in closures:
            with torch.enable_grad():
                found = hutchinson(
                    closure(), params, probe=self.probe, samples=self.samples, generator=generator
                )
            for known, one in zip(total, found):
                assert known is not None
                known.add_(one)
        parts = _summed(total, len(closures))
        # What is maximised is the loss that is minimised, turned over.
        signs = [
            -1 if group["maximize"] else 1
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        self._average(
            [sign * known / parts for sign, known in zip(signs, total) if known is not None]
        )


def _summed(values: Sequence[Tensor | None], count: int) -> int:
    """Add values in place, and a count, over all processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return count
    for value in values:
        if value is not None:
            distributed.all_reduce(value)
    device = next(value.device for value in values if value is not None)
    counts = torch.tensor(count, device=device)
    distributed.all_reduce(counts)
    return int(counts)
