"""Paths given by a table of betas, as diffusers' checkpoints were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.errors import unknown
from rectiflow.flows.paths import TINY
from rectiflow.flows.tables import DiscretePath

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SCHEDULES = ("linear", "scaled_linear")
# What a scheduler's configuration must say, and what it is called here.
STATED = {
    "beta_schedule": "betas",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "num_train_timesteps": "count",
}


@dataclass(frozen=True)
class SchedulePath(DiscretePath):
    """A variance-preserving path through the noise levels of a discrete diffusion.

    At the times of indices `alpha² = alpha_bar`, the cumulative product of `1 - beta`; in between
    alpha is linear in t. Nothing has a default that decides the noise levels, since weights are
    worth nothing under another schedule than their own; Stable Diffusion 1.5 and XL use
    `SchedulePath("scaled_linear", 0.00085, 0.012)`. For a table that no two betas describe there
    is `TablePath`.

    Unless `zero_terminal_snr`, the states at t = 0 of training keep a little of the data
    (`alpha(0)` is 0.068 for Stable Diffusion) while sampling starts from noise alone, at full
    strength. The velocity is unbounded as t goes to 1; noise, data and v predictions are not.

    Args:
        betas: "linear" (betas evenly spaced) or "scaled_linear" (their roots are).
        beta_start: beta of index 0.
        beta_end: beta of the last index.
        count: number of indices.
        zero_terminal_snr: shift and scale alpha so that it is 0 at the last index. Noise
            predictions then say nothing of the data there: use data or v.

    Raises:
        ValueError: an unknown schedule, betas that are not `0 < start <= end < 1`, or fewer than
            two indices.

    Example:
        >>> path = SchedulePath("scaled_linear", 0.00085, 0.012)
        >>> round(path.alpha(path.time(torch.tensor([499]))).square().item(), 4)
        0.2777

    Source: arXiv 2410.07303, section 4 (kept schedules); arXiv 2006.11239 (linear), arXiv
        2112.10752 (scaled linear); arXiv 2305.08891, algorithm 1 (zero terminal SNR).
    """

    betas: str
    beta_start: float
    beta_end: float
    count: int = 1000
    zero_terminal_snr: bool = False
    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        if self.betas not in SCHEDULES:
            raise unknown("beta schedule", self.betas, SCHEDULES)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas need 0 < beta_start <= beta_end < 1, got {self.beta_start} and "
                f"{self.beta_end}"
            )
        if self.count < 2:
            raise ValueError(f"count must be >= 2, got {self.count}")

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> SchedulePath:
        """The path of a diffusers scheduler's configuration (`scheduler_config.json`).

        Raises:
            ValueError: the configuration leaves out a part of its schedule, which has no default
                here, or gives betas one by one.

        Example:
            >>> SchedulePath.from_scheduler({"beta_schedule": "linear"})
            Traceback (most recent call last):
            ValueError: the scheduler does not state beta_start, beta_end, num_train_timesteps: ...
        """
        missing = [key for key in STATED if config.get(key) is None]
        if missing:
            raise ValueError(
                f"the scheduler does not state {', '.join(missing)}: weights belong to one noise "
                "schedule and no default is guessed, so pass the configuration they were "
                "trained with"
            )
        if config.get("trained_betas") is not None:
            raise ValueError(
                "the scheduler gives its betas one by one (trained_betas): only "
                f"{' and '.join(SCHEDULES)} schedules are known"
            )
        values = {own: config[key] for key, own in STATED.items()}
        return cls(**values, zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)))

    def alpha_bar(self) -> Float[Tensor, " count"]:
        """The table: the cumulative product of `1 - beta` by index, float32."""
        root = self.betas == "scaled_linear"
        start, end = (b**0.5 if root else b for b in (self.beta_start, self.beta_end))
        betas = torch.linspace(start, end, self.count, dtype=torch.float32)
        table = torch.cumprod(1 - (betas.square() if root else betas), 0)
        if not self.zero_terminal_snr:
            return table
        alpha = table.sqrt()
        return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and its derivative at times, in float64."""
        alphas = _alphas(self, t.device)
        place = self.count * (1 - t.double())
        left = place.floor().clamp(0, self.count - 1).long()
        rise = alphas[left + 1] - alphas[left]
        return alphas[left] + (place - left) * rise, -self.count * rise

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self._segment(t)[0].to(t.dtype)

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        alpha = self._segment(t)[0]
        return ((1 - alpha) * (1 + alpha)).clamp(min=0).sqrt().to(t.dtype)

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return self._segment(t)[1].to(t.dtype)

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        alpha, slope = self._segment(t)
        sigma = ((1 - alpha) * (1 + alpha)).clamp(min=0).sqrt().clamp(min=TINY)
        return (-alpha * slope / sigma).to(t.dtype)


@lru_cache(maxsize=32)
def _alphas(path: SchedulePath, device: torch.device) -> Tensor:
    """alpha at clean data and at every index, float64."""
    table = path.alpha_bar().double().sqrt()
    return torch.cat([table.new_ones(1), table]).to(device)
