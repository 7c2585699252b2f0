import math

import pytest
import torch
from tests.oracles.official_sde import official_sampler

from rectiflow.flows import GaussianField, StochasticEuler, integrate
from rectiflow.flows.path_registry import build

PATHS = 20_000


def start(field, seed=0):
    """Draws of the exact distribution at t = 0."""
    noise = torch.randn(PATHS, 1, generator=torch.Generator().manual_seed(seed))
    zero = torch.zeros(())
    alpha, sigma = field.path.alpha(zero), field.path.sigma(zero)
    return alpha * field.mean + (sigma**2 + (alpha * field.std) ** 2).sqrt() * noise


def deviations(x, mean=2.0, std=0.5):
    """Errors of mean and variance in standard errors."""
    off_mean = (x.mean() - mean) / (std / math.sqrt(PATHS))
    off_variance = (x.var() / std**2 - 1) / math.sqrt(2 / PATHS)
    return abs(off_mean.item()), abs(off_variance.item())


@pytest.mark.parametrize("path", ["rectified", "vp"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_invariant_10_ends_keep_mean_and_variance(path, scale):
    field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]), build(path))
    generator = torch.Generator().manual_seed(1)
    found = integrate(field, start(field), 400, StochasticEuler(scale), generator=generator)
    assert max(deviations(found)) < 3


@pytest.mark.parametrize("scale, mean", [(1.0, 1.78), (3.0, 0.86)])
def test_invariant_10_fails_for_the_official_drift(scale, mean):
    field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
    generator = torch.Generator().manual_seed(1)
    found = official_sampler(field.velocity, start(field), 400, scale, generator)
    assert deviations(found)[0] > 30
    assert found.mean().item() == pytest.approx(mean, abs=0.02)


def test_wider_sources_keep_their_marginals():
    # x_t = t y + (1 - t) 3 z with y ~ N(2, 0.25): the velocity in closed form.
    def velocity(x, t):
        t = t[:, None]
        variance = 9 * (1 - t) ** 2 + 0.25 * t**2
        return 2 + (0.25 * t - 9 * (1 - t)) / variance * (x - 2 * t)

    source = 3 * torch.randn(PATHS, 1, generator=torch.Generator().manual_seed(0))
    solver = StochasticEuler(1.0, source_std=3.0, path=build("rectified"))
    generator = torch.Generator().manual_seed(1)
    found = integrate(velocity, source, 400, solver, generator=generator)
    assert max(deviations(found)) < 3


def test_without_noise_it_is_euler():
    field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
    x = start(field)[:10]
    found = integrate(field, x, 7, StochasticEuler(0.0))
    torch.testing.assert_close(found, integrate(field, x, 7, "euler"))


def test_the_generator_decides():
    field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
    x = start(field)[:10]
    first, second, third = (
        integrate(field, x, 5, "sde", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_misuse_is_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="the sde solver needs the field's path"):
        integrate(lambda x, t: x, x, 2, "sde")
    field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="forward in time only"):
        integrate(field, x, [1.0, 0.0], "sde")
    with pytest.raises(ValueError, match="scale must be >= 0"):
        StochasticEuler(-1.0)
    with pytest.raises(ValueError, match="source_std must be > 0"):
        StochasticEuler(source_std=0.0)
