"""A ring of eight unequal modes, matched in one step to a teacher known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rectiflow.distill.density_ratio import Discriminator
from rectiflow.distill.distribution_matching import DistributionMatching
from rectiflow.flows.couplings import TensorData
from rectiflow.flows.diffusion_paths import VarianceExplodingPath
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.mixture import MixtureField
from rectiflow.flows.sampling import draw_source, sample
from rectiflow.flows.times import Uniform
from rectiflow.recipes.tools import new_net, stage, train
from rectiflow.training.trainer import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Float

SHARES = (0.30, 0.22, 0.16, 0.11, 0.08, 0.06, 0.04, 0.03)
PRESENT = 0.005
"""A mode with less of the samples than this counts as lost."""


@dataclass(frozen=True)
class RingSettings:
    """Sizes of the experiment."""

    radius: float = 2.0
    """Radius of the ring."""
    std: float = 0.15
    """Standard deviation of each mode."""
    noises: tuple[float, float] = (0.1, 3.0)
    """Smallest and largest noise at which distributions are compared."""
    width: int = 128
    """Width of the three networks."""
    layers: int = 3
    """Their hidden layers; a residual block has two and the stem is one."""
    every: int = 3
    """Updates of fake flow and discriminator for one of the generator."""
    training: TrainerSettings = field(default_factory=lambda: stage(6000, batch_size=256))
    """The training; its steps are those of fake flow and discriminator."""
    points: int = 20_000
    """Real points for the discriminator."""
    count: int = 10_000
    """Samples measured."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, batches and noises."""


@dataclass(frozen=True)
class RingScores:
    """One generator, measured.

    Attributes:
        modes: modes that hold at least half a percent of the samples.
        variation: total variation between shares of modes, the data's and the samples'.
        near: share of samples within three standard deviations of a centre.
        samples: some of the samples, to look at.
    """

    modes: int
    variation: float
    near: float
    samples: Tensor


def centres(radius: float) -> Float[Tensor, "8 2"]:
    """Eight points evenly on a circle.

    Example:
        >>> centres(2.0)[0]
        tensor([2., 0.])
    """
    angle = torch.arange(8) * (math.pi / 4)
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def weighted_ring(
    count: int, settings: RingSettings, *, generator: torch.Generator
) -> Float[Tensor, "count 2"]:
    """Points of the data."""
    modes = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator)
    return centres(settings.radius)[modes] + settings.std * noise


def ring_path(settings: RingSettings) -> tuple[VarianceExplodingPath, Uniform]:
    """Noise added to unscaled data, and the times between smallest and largest noise.

    The level is close to geometric in time, so uniform times are log-uniform noises.
    """
    low, high = settings.noises
    path = VarianceExplodingPath(sigma_min=low / 2, sigma_max=high)
    # sigma(t) = low solved for t: (sigma_max / sigma_min)^(2 (1 - t)) = (low / sigma_min)² + 1.
    rest = math.log((low / path.sigma_min) ** 2 + 1) / (2 * math.log(high / path.sigma_min))
    return path, Uniform(0.0, 1 - rest)


def match_ring(settings: RingSettings, divergence: str, seed: int) -> RingScores:
    """Train a one-step generator under a divergence and measure it."""
    path, times = ring_path(settings)
    teacher = MixtureField(centres(settings.radius), torch.tensor(SHARES), settings.std, path)
    data = weighted_ring(settings.points, settings, generator=torch.Generator().manual_seed(0))
    shape = {"shape": (2,), "width": settings.width, "depth": (settings.layers - 1) // 2}
    # The generator starts as the identity on wide noise, which leaves no mode out.
    student = FlowModel(new_net("mlp", seed=seed, **shape), path, "noise", shape=(2,))
    fake = FlowModel(new_net("mlp", seed=seed + 1, **shape), path, "data", shape=(2,))

    def features(x: Tensor, t: Tensor) -> Tensor:
        noise = path.sigma(t).unsqueeze(1)
        return torch.cat([x, x / (1 + noise.square()).sqrt(), noise.log()], 1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Discriminator([(5,)], width=settings.width, depth=settings.layers)
    method = DistributionMatching(
        teacher,
        TensorData(data),
        student=student,
        fake=fake,
        divergence=divergence,
        times=times,
        features=features,
        discriminator=judge,
        gan_weight=0.0,
        student_every=settings.every,
        warmup=settings.training.steps // 20,
    )
    model = train(method, replace(settings.training, seed=seed), title=f"ring, {divergence}")
    return score_ring(model, settings)


def score_ring(model: FlowModel, settings: RingSettings) -> RingScores:
    """Measures of a generator; the same noises for all of them."""
    source = draw_source(model, settings.count, generator=torch.Generator().manual_seed(1234))
    return score_points(sample(model, source=source).cpu(), settings)


def score_points(points: Float[Tensor, "n 2"], settings: RingSettings) -> RingScores:
    """Measures of samples."""
    distance, mode = torch.cdist(points, centres(settings.radius)).min(1)
    found = torch.bincount(mode, minlength=8) / len(points)
    return RingScores(
        modes=int((found >= PRESENT).sum()),
        variation=0.5 * float((found - torch.tensor(SHARES)).abs().sum()),
        near=float((distance <= 3 * settings.std).float().mean()),
        samples=points[:1500],
    )
