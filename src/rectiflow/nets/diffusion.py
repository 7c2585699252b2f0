"""Networks of diffusion models, as velocities on straight lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rectiflow.errors import positive, unknown
from rectiflow.nets import registry
from rectiflow.nets.base import null_condition_of

if TYPE_CHECKING:
    from jaxtyping import Float

# What networks of each family may output.
FAMILIES = {
    "edm": ("network", "data"),
    "vp": ("noise", "data", "score", "v"),
    "ve": ("noise", "data", "score"),
}


class DiffusionVelocity(nn.Module):
    """A diffusion network as the velocity of the rectified path.

    Every Gaussian corruption `a data + s noise` is the straight line `x_t = t data + n noise`,
    n = 1 - t, at another scale and by another clock: the network is asked at the time at which
    `s / a = n / t =: sigma`, its input scaled to fit, and its answer is combined with x_t into the
    velocity. What the network knows is kept whole, and it can be trained on as a flow.

    Families and inputs: `edm` sees `x / t` (the denoiser) or the preconditioned `x / sqrt(r)`, with
    `r = n² + (t sigma_data)²`; `vp` sees `x / sqrt(t² + n²)`; `ve` sees `x / t`. With o its output
    the velocity is
        network   ((t sigma_data² - n) x / r) + sigma_data o / sqrt(r)
        data      (o - x) / n
        noise     (x - o) / t
        score     (x + s o) / t, with s the noise in what the network sees
        v         ((t - n) x / (t² + n²)) - o / sqrt(t² + n²)
    The first and the last hold to both ends; the others amplify rounding where they divide by
    little. Beyond the range of sigma that the network was made for it is asked at the nearest end.

    Args:
        net: the network `net(y, clock, **condition)`, or the name of one of ours.
        options: arguments of a network given by name.
        family: edm, vp or ve.
        output: what the network outputs: for edm network (the preconditioned F) or data (the
            denoiser D); for vp noise, data, score or v; for ve noise, data or score.
        sigma_data: standard deviation of the data (edm).
        sigma_min: the smallest sigma the network was trained for (edm, ve).
        sigma_max: the largest.
        beta_min: first and
        beta_max: last noise rate of a continuous VP schedule.
        time_scale: the clock of a continuous VP network at its noisy end.
        betas: noise rates of a discrete VP schedule, whose clock counts them from 0.
        classes: number of classes of a network that takes labels as one-hot vectors.
        one_hot: the argument by which it takes them.

    Raises:
        ValueError: an unknown family or output, or a number out of range.

    Example:
        >>> net = DiffusionVelocity(net="mlp", options={"shape": [2], "width": 8, "depth": 1})
        >>> net(torch.ones(1, 2), torch.zeros(1)).tolist()  # toward the mean 0 of the data
        [[-1.0, -1.0]]

    Source: arXiv 2405.20320, proposition 1, in a form that does not cancel; arXiv 2206.00364,
        table 1 (clocks and preconditioning).
    """

    name: ClassVar[str] = "diffusion"

    def __init__(
        self,
        *,
        net: nn.Module | str,
        options: Mapping[str, Any] | None = None,
        family: str = "edm",
        output: str = "network",
        sigma_data: float = 0.5,
        sigma_min: float = 1e-5,
        sigma_max: float = 1e5,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        time_scale: float = 999.0,
        betas: Sequence[float] | None = None,
        classes: int = 0,
        one_hot: str | None = None,
    ) -> None:
        super().__init__()
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
        if output not in FAMILIES[family]:
            raise unknown(f"output of a {family} network", output, FAMILIES[family])
        positive("sigma_data", sigma_data)
        positive("sigma_min", sigma_min)
        positive("sigma_max - sigma_min", sigma_max - sigma_min)
        positive("beta_max - beta_min", beta_max - beta_min)
        positive("beta_min", beta_min)
        positive("classes", classes, zero=one_hot is None)
        if isinstance(net, str):
            net = registry.build(net, **(options or {}))
        self.net, self.family, self.output, self.one_hot = net, family, output, one_hot
        self.sigma_data, self.time_scale = sigma_data, time_scale
        self.beta_min, self.beta_max = beta_min, beta_max
        self.own_classes = classes
        self.table = None if betas is None else _log_ratios(betas)
        self.sigmas = self._range(sigma_min, sigma_max)
        self.config = self._config(
            family=family,
            output=output,
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            beta_min=beta_min,
            beta_max=beta_max,
            time_scale=time_scale,
            betas=None if betas is None else [float(beta) for beta in betas],
            classes=classes,
            one_hot=one_hot,
        )

    def forward(
        self, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """The velocity."""
        time = t.to(torch.promote_types(t.dtype, torch.float32))
        low, high = self.sigmas
        # Of both only the smaller one is rounded by the difference from 1.
        t_in = time.clamp(min=1 / (1 + high))
        n_in = (1 - time).clamp(min=low / (1 + low))
        sigma = (n_in / t_in).clamp(low, high)
        wide = time.reshape(-1, *(1,) * (x.ndim - 1))
        t_wide, n_wide, sigma_wide = (v.reshape(wide.shape) for v in (t_in, n_in, sigma))
        scale = self._scale(wide, t_wide)
        given = self._given(condition, x.dtype)
        said = self.net((x * scale).to(x.dtype), self._clock(sigma).to(t.dtype), **given)
        if self.output == "network":
            weight = wide * self.sigma_data**2 - (1 - wide)
            found = scale**2 * weight * x + self.sigma_data * scale * said
        elif self.output == "data":
            found = (said - x) / n_wide
        elif self.output == "noise":
            found = (x - said) / t_wide
        elif self.output == "v":
            found = scale**2 * (2 * wide - 1) * x - scale * said
        else:
            # On a VP schedule the network saw the noise shrunk by the same factor as x.
            spread = sigma_wide if self.family == "ve" else (1 - wide) * scale
            found = (x + spread * said) / t_wide
        return found.to(x.dtype)

    def denoise(
        self, y: Float[Tensor, "b *dims"], sigma: Float[Tensor, " b"], **condition: Any
    ) -> Float[Tensor, "b *dims"]:
        """EDM's denoiser D at `y = data + sigma noise`: the estimate of the data.

        Raises:
            ValueError: the network is not of the edm family.
        """
        if self.family != "edm":
            raise ValueError(f"the denoiser D belongs to the edm family, got {self.family!r}")
        condition = self._given(condition, y.dtype)
        if self.output == "data":
            return self.net(y, sigma, **condition)
        wide = sigma.reshape(-1, *(1,) * (y.ndim - 1))
        total = wide.square() + self.sigma_data**2
        said = self.net(y * total.rsqrt(), self._clock(sigma), **condition)
        skip = self.sigma_data**2 / total
        return skip * y + wide * self.sigma_data * total.rsqrt() * said

    @property
    def classes(self) -> int:
        """The number of classes, 0 for an unconditional network."""
        return self.own_classes if self.one_hot else int(getattr(self.net, "classes", 0))

    @property
    def conditional(self) -> bool:
        """Whether the network inside takes labels or text."""
        return self.classes > 0 or bool(getattr(self.net, "conditional", False))

    def null_condition(self, **condition: Any) -> dict[str, Any]:
        """The condition that stands for "none"."""
        if self.one_hot:
            label = condition.get("label")
            return {} if label is None else {"label": torch.full_like(label, self.classes)}
        return null_condition_of(self.net, condition)

    def check(self, x: Tensor, **condition: Any) -> None:
        """Raise ValueError unless the network can be called with `x` and this condition."""
        if self.one_hot:
            label = condition.get("label")
            if set(condition) - {"label"} or (label is not None and label.dtype != torch.int64):
                raise ValueError("the network takes the condition 'label' only, of int64")
            if label is None or not label.numel():
                return
            if not 0 <= int(label.min()) <= int(label.max()) <= self.classes:
                raise ValueError(
                    f"label must be from 0 to {self.classes - 1} ({self.classes} for none), "
                    f"got {int(label.min())} to {int(label.max())}"
                )
            return
        known = getattr(self.net, "check", None)
        if known is not None:
            known(x, **condition)

    def _scale(self, t: Tensor, held: Tensor) -> Tensor:
        """What x is multiplied by for the network to see."""
        if self.output == "network":
            return ((1 - t).square() + (t * self.sigma_data).square()).rsqrt()
        if self.family == "vp":
            return (t.square() + (1 - t).square()).rsqrt()
        return 1 / held

    def _clock(self, sigma: Tensor) -> Tensor:
        """The time by which the network counts."""
        if self.output == "network":
            return 0.25 * sigma.log()
        if self.family != "vp":
            return sigma
        if self.table is not None:
            return _interpolate(self.table.to(sigma.device, sigma.dtype), sigma.log())
        # -log alpha = (beta_max - beta_min) u²/4 + beta_min u/2, solved for u without cancelling.
        decay = 0.5 * torch.log1p(sigma.square())
        rise = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 4 * rise * decay).sqrt()
        return self.time_scale * (4 * decay / (self.beta_min + root)).clamp(max=1)

    def _range(self, low: float, high: float) -> tuple[float, float]:
        """The least and the greatest sigma at which the network is asked."""
        if self.family != "vp":
            return low, high
        if self.table is not None:
            return math.exp(float(self.table[0])), math.exp(float(self.table[-1]))

        def sigma(u: float) -> float:
            decay = (self.beta_max - self.beta_min) * u * u / 4 + self.beta_min * u / 2
            return math.sqrt(math.expm1(2 * decay))

        return sigma(1e-5), sigma(1.0)

    def _given(self, condition: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The condition in the network's own form."""
        label = condition.get("label")
        if not self.one_hot or label is None:
            return condition
        # The null index becomes a row of zeros, as in EDM.
        rows = nn.functional.one_hot(label, self.classes + 1)[:, : self.classes]
        return {self.one_hot: rows.to(dtype)}

    def _config(self, **values: Any) -> dict[str, Any] | None:
        """What rebuilds the network; None around a network that we cannot build."""
        name, options = getattr(self.net, "name", None), getattr(self.net, "config", None)
        if name not in registry.names() or not isinstance(options, dict):
            return None
        return {"net": name, "options": options, **values}


def _log_ratios(betas: Sequence[float]) -> Tensor:
    """The log of noise over data after each step of a discrete schedule."""
    rates = torch.tensor([float(beta) for beta in betas], dtype=torch.float64)
    if len(rates) < 2 or not bool(((rates > 0) & (rates < 1)).all()):
        raise ValueError("betas must be two or more numbers between 0 and 1")
    log_kept = torch.log1p(-rates).cumsum(0)
    return 0.5 * (torch.expm1(-log_kept)).log()


def _interpolate(table: Tensor, values: Tensor) -> Tensor:
    """The (fractional) positions of values in a rising table."""
    after = torch.searchsorted(table, values).clamp(1, len(table) - 1)
    low, high = table[after - 1], table[after]
    inside = ((values - low) / (high - low)).clamp(0, 1)
    return (after - 1).to(values.dtype) + inside
