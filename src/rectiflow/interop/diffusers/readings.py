"""How a diffusers network is called at our times, and what its output says.

A reading turns our `(x, t)` into the state and the timestep that the network knows, and its
output into a velocity, a noise or data. The same weights can be read in several ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rectiflow.errors import positive, unknown
from rectiflow.flows.paths import Path, RectifiedPath, expand
from rectiflow.flows.tables import TablePath

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

OUTPUTS = ("epsilon", "sample", "v_prediction")
Raw = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class FlowReading:
    """The output is the velocity of a rectified flow; the network is told `steps (1 - t)`.

    Stable Diffusion 3 and FLUX are read so, and a diffusion U-Net whose output is reinterpreted
    as a velocity before it is trained as one (InstaFlow).

    Args:
        steps: the timestep of pure noise.
        toward: where the output points: "noise" as in diffusers' flow schedulers, or "data" as in
            InstaFlow's checkpoints.

    Source: arXiv 2309.06380, section 3 (reinterpretation; times 1000 (1 - i/N)).
    """

    steps: float = 1000.0
    toward: str = "noise"
    kind: ClassVar[str] = "flow"
    prediction: ClassVar[str] = "velocity"

    def __post_init__(self) -> None:
        positive("steps", self.steps)
        if self.toward not in ("data", "noise"):
            raise unknown("direction", self.toward, ("data", "noise"))

    @property
    def path(self) -> Path:
        """The path its predictions belong to."""
        return RectifiedPath()

    def __call__(
        self, raw: Raw, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b *dims"]:
        output = raw(x, self.steps * (1 - t))
        return output if self.toward == "data" else -output


@dataclass(frozen=True)
class TableReading:
    """The output is what a diffusion model was trained on, on its own noise schedule.

    The model stays a diffusion model on a curved path. `v_prediction` (`alpha noise - sigma data`)
    is turned into data, which costs no division.

    Args:
        alpha_bar: the scheduler's `alphas_cumprod`.
        output: epsilon, sample or v_prediction.
    """

    alpha_bar: Sequence[float]
    output: str = "epsilon"
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def path(self) -> TablePath:
        """The path its predictions belong to."""
        return self._path  # type: ignore[attr-defined]

    @property
    def prediction(self) -> str:
        """noise or data."""
        return "noise" if self.output == "epsilon" else "data"

    def __call__(
        self, raw: Raw, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b *dims"]:
        output = raw(x, self.path.index(t))
        if self.output != "v_prediction":
            return output
        time = expand(t, x)
        return (self.path.alpha(time) * x - self.path.sigma(time) * output).to(x.dtype)


@dataclass(frozen=True)
class AnalyticReading:
    """A diffusion network read as the rectified flow with the same marginals, exactly.

    All Gaussian corruptions of the same data share their posterior means: the rectified state
    `x = t D + (1 - t) N` times `1 / sqrt(t² + (1 - t)²)` is the diffusion's state at the timestep
    with `alpha / sigma = t / (1 - t)`, and the velocity is `D - N`. Both are computed from
    coefficients of that timestep, so nothing is divided by t or 1 - t inside the table. Euler
    steps of this flow are DDIM steps. Below the table's last timestep the network is asked there
    and `v = (D - x) / (1 - t)`; beyond its first, `v = (x - N) / t`: both continue it.

    Args:
        alpha_bar: the scheduler's `alphas_cumprod`.
        output: epsilon, sample or v_prediction.

    Source: arXiv 2405.20320, proposition 1.
    """

    alpha_bar: Sequence[float]
    output: str = "epsilon"
    kind: ClassVar[str] = "analytic"
    prediction: ClassVar[str] = "velocity"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def path(self) -> Path:
        """The path its predictions belong to."""
        return RectifiedPath()

    @property
    def table(self) -> TablePath:
        """The diffusion's own path."""
        return self._path  # type: ignore[attr-defined]

    def time(self, timestep: float) -> float:
        """Our time of a timestep of the table.

        Example:
            >>> round(AnalyticReading((0.9, 0.5, 0.1)).time(1.0), 6)
            0.5
        """
        at = self.table.time(torch.tensor(timestep, dtype=torch.float64))
        return float(torch.sigmoid(self.table.log_snr(at)))

    def __call__(
        self, raw: Raw, x: Float[Tensor, "b *dims"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b *dims"]:
        # Not in half precision: timesteps near the ends would be lost.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        ratio = torch.logit(t, 1e-7)
        timestep = self.table.index_at(ratio)
        time = expand(t, x)
        state = x / (time.square() + (1 - time).square()).sqrt()
        output = raw(state.to(x.dtype), timestep)
        inside = expand(self.table.log_snr(self.table.time(timestep)), x)
        alpha, sigma = torch.sigmoid(2 * inside).sqrt(), torch.sigmoid(-2 * inside).sqrt()
        if self.output == "epsilon":
            noise, data = output, (state - sigma * output) / alpha
        elif self.output == "sample":
            noise, data = (state - alpha * output) / sigma, output
        else:
            noise, data = alpha * output + sigma * state, alpha * state - sigma * output
        start, stop = self.time(self.table.count - 1.0), self.time(0.0)
        early = (data - x) / (1 - time).clamp(min=1e-3)
        late = (x - noise) / time.clamp(min=1e-3)
        velocity = torch.where(time < start, early, torch.where(time > stop, late, data - noise))
        return velocity.to(x.dtype)


Reading = FlowReading | TableReading | AnalyticReading


def _check(reading: Any) -> None:
    """Refuse unknown outputs, make the table plain and keep its path."""
    if reading.output not in OUTPUTS:
        raise unknown("output", reading.output, OUTPUTS)
    path = TablePath(reading.alpha_bar)
    object.__setattr__(reading, "alpha_bar", path.alpha_bar)
    object.__setattr__(reading, "_path", path)


def describe(reading: Reading) -> dict[str, Any]:
    """A reading as plain values."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(reading).items()}
    return {"kind": reading.kind, **values}


def reading_of(description: Mapping[str, Any]) -> Reading:
    """The reading of a description.

    Example:
        >>> reading_of({"kind": "flow", "toward": "data"})
        FlowReading(steps=1000.0, toward='data')
    """
    kinds: dict[str, Any] = {one.kind: one for one in (FlowReading, TableReading, AnalyticReading)}
    values = dict(description)
    kind = values.pop("kind")
    if kind not in kinds:
        raise unknown("reading", kind, kinds)
    return kinds[kind](**values)
