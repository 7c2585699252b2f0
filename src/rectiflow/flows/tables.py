"""Paths of discrete diffusion models, whose noise schedule is a table of timesteps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch

from rectiflow.errors import positive
from rectiflow.flows.paths import Path
from rectiflow.flows.times import Discrete

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Half log signal-to-noise ratios are held within these: alpha or sigma of 1e-5 at the ends.
MOST_LOG_SNR = 11.5


@dataclass(frozen=True)
class DiscretePath(Path):
    """A variance-preserving path whose network knows `count` indices in place of times.

    Index 0 (least noise) to count - 1 lies at `t = 1 - (index + 1) / count`, so that uniform steps
    are the 'trailing' grid: they start at the last index and leave out none. t = 1 is clean data,
    one step beyond index 0. States at t = 0 of training may keep a little of the data, while
    sampling starts from noise alone, at full strength.
    """

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of indices."""

    def time(self, index: Float[Tensor, "*b"] | Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The time of (fractional) indices; float64 for whole ones."""
        time = 1 - (index.double() + 1) / self.count
        return time.to(index.dtype) if index.is_floating_point() else time

    def index(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The (fractional) index at times, as a network of the discrete diffusion expects it."""
        return (self.count * (1 - t.double()) - 1).clamp(min=0).to(t.dtype)

    def trailing(self, steps: int, *, clean: bool = True) -> list[float]:
        """The grid of `steps` steps that starts at the last index ('trailing' spacing).

        Args:
            steps: number of steps, at most `count`.
            clean: end at clean data; otherwise at index 0, which keeps a little noise
                (diffusers' `set_alpha_to_one=False`).

        Raises:
            ValueError: `steps` below 1 or above the number of indices.

        Example:
            >>> TablePath((0.9, 0.5, 0.2, 0.1)).trailing(2)
            [0.0, 0.5, 1.0]
        """
        positive("steps", steps)
        if steps > self.count:
            raise ValueError(f"a schedule of {self.count} indices has no grid of {steps} steps")
        # Rounding half to even, as NumPy does for diffusers.
        indices = [round(self.count - i * (self.count / steps)) - 1 for i in range(steps)]
        times = [1 - (index + 1) / self.count for index in indices]
        end = 1.0 if clean else 1 - 1 / self.count
        return [*(t for t in times if t < end), end]

    def training_times(self) -> Discrete:
        """The times of the indices, each as likely as any other."""
        return Discrete(tuple(self.time(torch.arange(self.count)).tolist()))

    def start_scale(self, like: Tensor) -> Float[Tensor, ""]:
        """One: sampling starts from noise alone, at the variance of the path."""
        return like.new_ones(())


@dataclass(frozen=True)
class TablePath(DiscretePath):
    """A variance-preserving path through a table `alpha_bar[k]`, k = 0 (data) to n - 1 (noise).

    At index k, `alpha² = alpha_bar[k]` and `alpha² + sigma² = 1`; at t = 1 `sigma = 1e-5`. Between
    indices the logarithm of `alpha / sigma` is interpolated linearly, so both coefficients and
    their derivatives keep all digits at both ends. A table that ends in pure noise is held at
    `alpha = 1e-5`.

    Args:
        alpha_bar: the scheduler's `alphas_cumprod`: two or more falling numbers in [0, 1].

    Raises:
        ValueError: a table that does not fall, or is out of range.

    Example:
        >>> path = TablePath((0.9, 0.5, 0.2, 0.1))
        >>> path.alpha(torch.tensor([0.0, 0.25, 0.5, 0.75])).square()
        tensor([0.1000, 0.2000, 0.5000, 0.9000])

    Source: arXiv 2006.11239, section 2 (the table); arXiv 2206.00927, appendix D.4 (log ratio).
    """

    alpha_bar: Sequence[float]
    name: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        table = torch.tensor([float(value) for value in self.alpha_bar], dtype=torch.float64)
        falls = len(table) >= 2 and bool((table[1:] < table[:-1]).all())
        if not falls or not (table[-1] >= 0 and table[0] <= 1):
            raise ValueError(
                f"alpha_bar must be two or more falling numbers in [0, 1], got {len(table)} from "
                f"{float(table[0]) if len(table) else float('nan'):g}: give alphas_cumprod"
            )
        object.__setattr__(self, "alpha_bar", tuple(table.tolist()))
        ratios = torch.cat([table.new_ones(1) * torch.inf, 0.5 * torch.logit(table)])
        object.__setattr__(self, "_log_snr", ratios.clamp(-MOST_LOG_SNR, MOST_LOG_SNR))

    @property
    def count(self) -> int:
        """n, the number of indices."""
        return len(self.alpha_bar)

    def log_snr(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """`log(alpha / sigma)` at times t."""
        return self._interpolate(t)[0]

    def index_at(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The (fractional) index with a `log(alpha / sigma)`, between 0 and n - 1."""
        table = self._table(log_snr)[1:]
        place = torch.searchsorted(-table, -log_snr.detach().contiguous())
        low = (place - 1).clamp(0, self.count - 2)
        part = (table[low] - log_snr) / (table[low] - table[low + 1])
        return low + part.clamp(0, 1)

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(2 * self.log_snr(t)).sqrt()

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        return torch.sigmoid(-2 * self.log_snr(t)).sqrt()

    def dalpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        ratio, slope = self._interpolate(t)
        return torch.sigmoid(2 * ratio).sqrt() * torch.sigmoid(-2 * ratio) * slope

    def dsigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        ratio, slope = self._interpolate(t)
        return -torch.sigmoid(-2 * ratio).sqrt() * torch.sigmoid(2 * ratio) * slope

    def _table(self, like: Tensor) -> Tensor:
        return _log_snr_on(self, like.device, like.dtype)

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The log ratio and its derivative in t."""
        table = self._table(t)
        place = (1 - t) * self.count
        low = place.detach().floor().clamp(0, self.count - 1).long()
        rise = table[low + 1] - table[low]
        return table[low] + (place - low) * rise, -self.count * rise


@lru_cache(maxsize=32)
def _log_snr_on(path: TablePath, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A path's log ratios, moved once."""
    table: Tensor = path._log_snr  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return table.to(device, dtype)
