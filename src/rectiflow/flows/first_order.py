"""The first-order step of a diffusion: exact wherever the noise estimate does not change.

A state `x = alpha D + sigma N` names a pair of data D and noise N. The step keeps the pair that a
field sees and moves to another time of the path. It is the DDIM step on variance-preserving paths
and the Euler step on straight lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from rectiflow.flows.paths import TINY, Path, expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def first_order_jump(
    path: Path,
    output: Float[Tensor, "b *dims"],
    x: Float[Tensor, "b *dims"],
    t: Float[Tensor, " b"],
    s: Float[Tensor, " b"],
    *,
    given: str = "velocity",
) -> Float[Tensor, "b *dims"]:
    """Carry states from their times t to times s along the pair that a prediction implies.

    `x_s = alpha(s) D + sigma(s) N` with the data D and the noise N of the prediction at `(x, t)`.
    Each row has its own times, so rows in different phases move together. With z = x / alpha and
    NSR = sigma / alpha it reads `z_s = z_t + (NSR_s - NSR_t) N`: Euler's method in coordinates
    in which a first-order flow is straight.

    Args:
        path: the path of the states.
        output: what was predicted at `(x, t)`.
        x: states at times t.
        t: present times, one a row.
        s: times to go to, later or earlier.
        given: what `output` is: velocity, noise, data, score or v.

    Raises:
        ValueError: an unknown prediction.

    Example:
        >>> from rectiflow.flows.paths import RectifiedPath
        >>> x, t, s = torch.ones(1, 1), torch.tensor([0.25]), torch.tensor([0.75])
        >>> first_order_jump(RectifiedPath(), torch.full((1, 1), 2.0), x, t, s)
        tensor([[2.]])

    Source: arXiv 2410.07303, section 3.2 (first-order ODE); arXiv 2010.02502, equation 12.
    """
    data = path.convert(output, x, t, given=given, wanted="data")
    noise = path.convert(output, x, t, given=given, wanted="noise")
    s = expand(s, x)
    return (path.alpha(s) * data + path.sigma(s) * noise).to(x.dtype)


def ends_through(
    path: Path,
    x: Float[Tensor, "b *dims"],
    t: Float[Tensor, " b"],
    y: Float[Tensor, "b *dims"],
    s: Float[Tensor, " b"],
) -> tuple[Float[Tensor, "b *dims"], Float[Tensor, "b *dims"]]:
    """The source and the target whose path is at x at time t and at y at time s.

    Two states fix the pair: `x = alpha(t) D + sigma(t) N` and `y = alpha(s) D + sigma(s) N`. The
    noise is the slope of the chord of `x / alpha` against NSR, finite also where alpha is 0.

    Example:
        >>> from rectiflow.flows.paths import RectifiedPath
        >>> x, y = torch.tensor([[1.5]]), torch.tensor([[2.0]])
        >>> ends_through(RectifiedPath(), x, torch.tensor([0.25]), y, torch.tensor([0.5]))
        (tensor([[1.]]), tensor([[3.]]))

    Source: arXiv 2410.07303, section 3.4 (phases), solved for both ends.
    """
    t, s = expand(t, x), expand(s, x)
    alpha, sigma, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    # Negative forward in time (NSR falls), positive backward; never 0 for two times.
    determinant = alpha * sigma_s - alpha_s * sigma
    small = torch.where(determinant < 0, -(TINY**2), TINY**2)
    determinant = torch.where(determinant.abs() < TINY**2, small, determinant)
    source = (alpha * y - alpha_s * x) / determinant
    target = (sigma_s * x - sigma * y) / determinant
    return source.to(x.dtype), target.to(x.dtype)


@dataclass(frozen=True)
class FirstOrder:
    """The solver of first-order steps: DDIM for any path, Euler's method on straight lines.

    Use it for models on curved paths and few steps. It is exact in one step where the noise
    estimate is constant along trajectories, which is what `RectifiedDiffusion` trains for, however
    curved the states' own way is. Works in both directions of time.

    Args:
        path: the field's path; taken from the field when it has one.

    Source: arXiv 2410.07303, section 3.2; arXiv 2010.02502, equation 12.
    """

    path: Path | None = None
    # The end of a step is a node, so that its time is exact where alpha or sigma vanish.
    nodes: tuple[float, ...] = (0.0, 1.0)
    order: int = 1

    def bind(self, field: Any) -> FirstOrder:
        path = self.path or getattr(field, "path", None)
        if path is None:
            raise ValueError(
                "the first-order solver needs the field's path: pass a Field such as FlowModel, "
                "or FirstOrder(path=...)"
            )
        return replace(self, path=path)

    def intervals(self, times: Sequence[float]) -> list[float]:
        return [after - before for before, after in pairwise(times)]

    def step(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        times: Sequence[Tensor],
        dt: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert self.path is not None
        t, s = times
        v = velocity(x, t)
        # Rounding may put the last time a digit beyond the path's end.
        return first_order_jump(self.path, v, x, t, s.clamp(0, 1)), v
