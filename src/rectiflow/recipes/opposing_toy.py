"""Opposing signals on a model that is known in closed form.

A sample has a signal x and, with probability p, a feature x_o of random signs; the target is
`b*'x + |x_o|_1 / sqrt(d)`, which is even in x_o, so that samples with x_o and -x_o oppose each
other.
The model is `c (b'x + b_o'x_o)`. With the feature's variance lam its loss is, up to a constant,

    L = |b* - c b|² / 2 + lam c² |b_o|² / 2.

To learn the signal c must grow, and with it the curvature `lam c²` along the useless b_o.

Source: arXiv 2311.04163, section 3; constants are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Toy:
    """The loss of the two-layer model, its derivatives and its data; weights are `(c, b, b_o)`.

    All functions take weights as the last dimension of `(*runs, 1 + signal + feature)`.

    Args:
        target: b*, the last dimension; one for all runs or one each.
        variance: lam, the variance of each coordinate of the feature.
        feature: number of its coordinates.
    """

    target: Tensor
    variance: float
    feature: int = 1

    def parts(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c with a last dimension of 1, b and b_o."""
        signal = self.target.shape[-1]
        return weights[..., :1], weights[..., 1 : 1 + signal], weights[..., 1 + signal :]

    def loss(self, weights: Float[Tensor, "*runs n"]) -> Float[Tensor, "*runs"]:
        """The loss without its constant."""
        c, b, feature = self.parts(weights)
        missing = self.target - c * b
        swing = self.variance * (c * feature).square()
        return (missing.square().sum(-1) + swing.sum(-1)) / 2

    def gradient(self, weights: Float[Tensor, "*runs n"]) -> Float[Tensor, "*runs n"]:
        """Its gradient."""
        c, b, feature = self.parts(weights)
        missing = self.target - c * b
        squares = feature.square().sum(-1, keepdim=True)
        outer = self.variance * c * squares - (missing * b).sum(-1, keepdim=True)
        return torch.cat([outer, -c * missing, self.variance * c.square() * feature], -1)

    def hessian(self, weights: Float[Tensor, "*runs n"]) -> Float[Tensor, "*runs n n"]:
        """Its second derivatives."""
        c, b, feature = self.parts(weights)
        bent = torch.cat([torch.ones_like(b), self.variance * torch.ones_like(feature)], -1)
        matrix = torch.diag_embed(torch.cat([torch.zeros_like(c), c.square() * bent], -1))
        inner = torch.cat([b, feature], -1)
        matrix[..., 0, 0] = (bent * inner.square()).sum(-1)
        mixed = 2 * c * bent * inner
        mixed = mixed - torch.cat([self.target.expand_as(b), torch.zeros_like(feature)], -1)
        matrix[..., 0, 1:] = matrix[..., 1:, 0] = mixed
        return matrix

    def sharpness(self, weights: Float[Tensor, "*runs n"]) -> Float[Tensor, "*runs"]:
        """The largest eigenvalue of the Hessian."""
        return torch.linalg.eigvalsh(self.hessian(weights))[..., -1]

    def conserved(self, weights: Float[Tensor, "*runs n"]) -> Float[Tensor, "*runs"]:
        """`c² - |b|² - |b_o|²`, which gradient flow keeps."""
        c, b, feature = self.parts(weights)
        return c.square().sum(-1) - b.square().sum(-1) - feature.square().sum(-1)

    def sample(
        self, count: int, share: float = 0.1, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "count n"], Float[Tensor, " count"]]:
        """Data of the model: inputs `(x, x_o)` and targets.

        Args:
            count: number of samples.
            share: p, how many have a feature.
            generator: the source of randomness.
        """
        options = {"generator": generator, "dtype": torch.float64}
        signal = torch.randn(count, len(self.target), **options)
        signs = torch.randn(count, self.feature, **options).sign()
        present = (torch.rand(count, 1, **options) < share).double()
        feature = present * signs * math.sqrt(self.variance / share)
        target = signal @ self.target
        target = target + feature.abs().sum(1) / math.sqrt(self.feature)
        return torch.cat([signal, feature], 1), target

    def answer(self, weights: Float[Tensor, " n"], inputs: Float[Tensor, "b m"]) -> Tensor:
        """What the model says to inputs."""
        return weights[0] * (inputs @ weights[1:])


def descend(
    toy: Toy,
    start: Float[Tensor, "*runs n"],
    rate: float,
    steps: int,
    *,
    frozen: bool = False,
) -> Float[Tensor, "steps *runs n"]:
    """The weights of gradient descent after 0, 1, ... steps.

    Args:
        toy: the model.
        start: first weights.
        rate: learning rate; a small one follows the gradient flow.
        steps: number of steps.
        frozen: keep c as it is: a model of one layer.
    """
    seen = [start]
    for _ in range(steps):
        slope = toy.gradient(seen[-1])
        if frozen:
            slope[..., 0] = 0
        seen.append(seen[-1] - rate * slope)
    return torch.stack(seen)


@dataclass(frozen=True)
class ToySettings:
    """The experiment on the toy."""

    target: float = 3.0
    """The coefficient b* that is to be learned."""
    sweep: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    """Coefficients for which the flow's last sharpness is compared."""
    variance: float = 50.0
    """Variance of the feature."""
    start: tuple[float, float, float] = (0.5, 0.05, 0.3)
    """First weights: outer, on the signal, on the feature."""
    rate: float = 0.015
    """Learning rate of descent: stable up to a sharpness of 133."""
    steps: int = 400
    """Steps of descent."""
    flow_rate: float = 1e-3
    """Step of the gradient flow."""
    flow_steps: int = 6000
    """Steps of the flow; in the end nothing moves."""


@dataclass(frozen=True)
class ToyFound:
    """What the toy did.

    Attributes:
        losses: losses of descent, by arm.
        sharpness: sharpness along descent and along the flow.
        spike: by arm the largest loss after it was below 1e-4 for the first time; NaN if it
            never was.
        settled: the last sharpness of descent times rate / 2; below 1 it is stable.
        final: by coefficient the last sharpness of the flow.
        linear: the squared correlation of those two.
    """

    losses: dict[str, list[float]]
    sharpness: dict[str, list[float]]
    spike: dict[str, float]
    settled: float
    final: dict[float, float]
    linear: float


ARMS = ("two layers", "no feature", "one layer")


def run_toy(settings: ToySettings) -> ToyFound:
    """Descent with its spike, two controls that have none, and the flow for several coefficients.

    Example:
        >>> found = run_toy(ToySettings(sweep=(3.0,), flow_steps=10))
        >>> found.spike["two layers"] > 1, found.spike["no feature"] < 1e-4
        (True, True)
    """
    start = torch.tensor(settings.start, dtype=torch.float64)
    target = torch.tensor([settings.target], dtype=torch.float64)
    toy, plain = Toy(target, settings.variance), Toy(target, 0.0)
    whole = torch.tensor([1.0, *settings.start[1:]], dtype=torch.float64)
    paths = {
        ARMS[0]: (toy, descend(toy, start, settings.rate, settings.steps)),
        ARMS[1]: (plain, descend(plain, start, settings.rate, settings.steps)),
        ARMS[2]: (toy, descend(toy, whole, settings.rate, settings.steps, frozen=True)),
    }
    losses = {arm: model.loss(path).tolist() for arm, (model, path) in paths.items()}
    targets = sorted({*settings.sweep, settings.target})
    swept = Toy(torch.tensor(targets, dtype=torch.float64).unsqueeze(1), settings.variance)
    flow = descend(swept, start.expand(len(targets), -1), settings.flow_rate, settings.flow_steps)
    flows = dict(zip(targets, swept.sharpness(flow).T.tolist()))
    final = {value: flows[value][-1] for value in settings.sweep}
    descent = toy.sharpness(paths[ARMS[0]][1]).tolist()
    return ToyFound(
        losses=losses,
        sharpness={"gradient descent": descent, "gradient flow": flows[settings.target]},
        spike={arm: spike_after_convergence(values) for arm, values in losses.items()},
        settled=descent[-1] * settings.rate / 2,
        final=final,
        linear=_squared_correlation(list(final), list(final.values())),
    )


def spike_after_convergence(losses: list[float], below: float = 1e-4) -> float:
    """The largest loss after the first one below a level; NaN if there is none.

    Example:
        >>> spike_after_convergence([1.0, 1e-5, 0.5, 0.1]), spike_after_convergence([1.0, 0.5])
        (0.5, nan)
    """
    first = next((i for i, loss in enumerate(losses) if loss < below), len(losses))
    return max(losses[first:], default=math.nan)


def _squared_correlation(x: list[float], y: list[float]) -> float:
    """Of two lists of two or more numbers; 1 for a single one."""
    if len(x) < 2:
        return 1.0
    return float(torch.corrcoef(torch.tensor([x, y], dtype=torch.float64))[0, 1] ** 2)
