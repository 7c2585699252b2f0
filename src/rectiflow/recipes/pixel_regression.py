"""A linear regression on raw pixels, with and without TrAct: random in its data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rectiflow.optim import TrActLinear

TRACT_RATE, SAME_RATE, BEST_RATE = "TrAct, rate 1", "plain, rate 1", "plain, best rate"


@dataclass(frozen=True)
class Regression:
    """A linear regression on pixels up to 255, whose loss is exactly quadratic.

    Attributes:
        plain: condition number of the Hessian.
        rectified: that of the steps TrAct takes, measured on the layer.
        expected: that of s / (s + lam) over the eigenvalues s.
        losses: loss above the least one, relative to the first, by training.
    """

    plain: float
    rectified: float
    expected: float
    losses: Mapping[str, tuple[float, ...]]


def regress(pixels: int, rows: int, count: int, *, lam: float = 0.1) -> Regression:
    """`count` steps on full batches in float64, from zero weights."""
    draw = torch.Generator().manual_seed(0)
    double = torch.float64
    x = torch.rand(rows, pixels, generator=draw, dtype=double) * 255
    # Pixels from dim to bright, as at the border and in the middle of images.
    x = x * torch.logspace(-2, 0, pixels, dtype=double)
    y = x @ torch.randn(pixels, 1, generator=draw, dtype=double) / 255
    y = y + 0.1 * torch.randn(y.shape, generator=draw, dtype=double)
    spectrum = torch.linalg.eigvalsh(x.T @ x / len(x))
    steps = spectrum / (spectrum + lam)
    least = float((x @ torch.linalg.lstsq(x, y).solution - y).square().mean() / 2)

    def layer(rectified: bool) -> nn.Linear:
        made = TrActLinear(pixels, 1, bias=False, lam=lam, dtype=double)
        if not rectified:
            made = nn.Linear(pixels, 1, bias=False, dtype=double)
        nn.init.zeros_(made.weight)
        return made

    def gradient(one: nn.Linear) -> Tensor:
        one.zero_grad()
        ((one(x) - y).square().mean() / 2).backward()
        assert one.weight.grad is not None
        return one.weight.grad[0]

    # The gradient is affine in the weights: its slope, one weight at a time.
    probe = layer(True)
    offset, slopes = gradient(probe), []
    for unit in torch.eye(pixels, dtype=double):
        probe.weight.data = unit[None].clone()
        slopes.append(gradient(probe) - offset)
    found = torch.linalg.eigvals(torch.stack(slopes)).real
    best = float(2 / (spectrum[0] + spectrum[-1]))
    losses = {}
    for name, rectified, rate in (
        (TRACT_RATE, True, 1.0),
        (SAME_RATE, False, 1.0),
        (BEST_RATE, False, best),
    ):
        one, curve = layer(rectified), []
        optimizer = torch.optim.SGD(one.parameters(), rate)
        for _ in range(count):
            gradient(one)
            curve.append(float((one(x) - y).square().mean().detach() / 2) - least)
            optimizer.step()
        # Beyond this a diverging loss is as good as infinite, and can still be drawn.
        losses[name] = tuple(min(max(value / curve[0], 1e-16), 1e12) for value in curve)
    return Regression(
        float(spectrum[-1] / spectrum[0]),
        float(found.max() / found.min()),
        float(steps.max() / steps.min()),
        losses,
    )
