"""Time samplers of Stable Diffusion 3: exact densities, the paper's sign, equal objectives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rectiflow.flows import CosMap, LogitNormal, Mode, TimeShift, Uniform, from_diffusers_args
from rectiflow.flows.snr_times import MODE_LIMIT

SAMPLERS = {
    "logit-normal": LogitNormal(),
    "toward noise": LogitNormal(1.0, 0.6),
    "toward data": LogitNormal(-0.5, 1.5),
    "mode": Mode(1.29),
    "mode, ends": Mode(-0.8),
    "mode, limit": Mode(1.7),
    "cosmap": CosMap(),
    "shifted": TimeShift(3.0, LogitNormal(0.2, 0.8)),
    "shifted mode": TimeShift(0.5, Mode(1.0)),
}
EVERY = pytest.mark.parametrize("name", sorted(SAMPLERS))


def density(sampler, t: float) -> float:
    return float(sampler.density(torch.tensor(t, dtype=torch.float64)))


def integral(function, stop: float = 1.0) -> float:
    """Over [0, stop] by Gauss-Legendre on 400 panels: exact to 1e-8 for all of these."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(10))
    starts = torch.arange(400, dtype=torch.float64)[:, None]
    t = stop * (starts + (nodes + 1) / 2) / 400
    return float((function(t) * weights).sum() * stop / 800)


@EVERY
def test_density_integrates_to_one_and_to_the_cdf(name):
    sampler = SAMPLERS[name]
    assert integral(sampler.density) == pytest.approx(1, abs=1e-7)
    for t in (0.05, 0.3, 0.5, 0.8):
        found = float(sampler.cdf(torch.tensor(t, dtype=torch.float64)))
        assert found == pytest.approx(integral(sampler.density, t), abs=1e-7)


@EVERY
def test_samples_follow_the_density(name):
    sampler = SAMPLERS[name]
    t = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert 0 <= float(t.min()) <= float(t.max()) <= 1
    again = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(t, again)
    test = stats.kstest(t.double().numpy(), lambda s: sampler.cdf(torch.from_numpy(s)).numpy())
    assert test.pvalue > 1e-3  # the seed is fixed: no flake


def test_density_is_zero_outside_and_finite_at_the_ends():
    t = torch.tensor([-0.1, 0.0, 1.0, 1.1])
    for name, sampler in SAMPLERS.items():
        found = sampler.density(t)
        assert found.isfinite().all(), name
        if not name.startswith("shifted"):
            assert found[0] == found[3] == 0


def test_logit_normal_is_the_papers_density_of_the_noise_level():
    # Equation 19 by hand, at the paper's time s = 1 - t.
    m, sd = 0.7, 1.3
    for s in (0.1, 0.4, 0.9):
        z = (math.log(s / (1 - s)) - m) / sd
        paper = math.exp(-z * z / 2) / (sd * math.sqrt(2 * math.pi) * s * (1 - s))
        assert density(LogitNormal(m, sd), 1 - s) == pytest.approx(paper, rel=1e-12)


def test_a_positive_mean_favours_noise_as_in_the_paper():
    generator = torch.Generator().manual_seed(0)
    t = LogitNormal(1.0, 0.5).sample(20_000, generator=generator).double()
    level = torch.logit(1 - t)
    assert float(t.mean()) < 0.35
    assert float(level.mean()) == pytest.approx(1.0, abs=0.02)  # five standard errors
    # log SNR of the rectified path is normal with mean -2 m and deviation 2 s.
    snr = 2 * torch.log(t / (1 - t))
    assert float(snr.mean()) == pytest.approx(-2.0, abs=0.04)
    assert float(snr.std()) == pytest.approx(1.0, abs=0.03)


def test_mode_is_the_papers_map():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.allclose(Mode(0.0)._level(u), 1 - u, atol=1e-15)
    for scale in (-1.0, 0.7, 1.29, MODE_LIMIT):
        level = Mode(scale)._level(u)
        assert torch.allclose(Mode(scale)._level(1 - u), 1 - level, atol=1e-14)
        assert bool((level.diff() <= 1e-15).all()), "monotone up to the limit"
    beyond = object.__new__(Mode)
    object.__setattr__(beyond, "scale", MODE_LIMIT + 0.05)
    assert bool((beyond._level(u).diff() > 0).any()), "not beyond it"
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    s = 1.29
    expected = torch.tensor([1 / (1 + s), 1 / (1 + s - s * math.pi / 2), 1 / (1 + s)]).double()
    torch.testing.assert_close(Mode(s).density(t), expected, rtol=1e-6, atol=0)
    assert torch.equal(Mode(0.0).density(t), torch.ones(3, dtype=torch.float64))


def test_cosmap_has_the_log_snr_of_the_cosine_schedule():
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    level = 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
    rectified = 2 * torch.log((1 - level) / level)
    cosine = 2 * torch.log(torch.cos(math.pi * u / 2) / torch.sin(math.pi * u / 2))
    torch.testing.assert_close(rectified, cosine, rtol=1e-9, atol=1e-9)
    # P(level <= level(u)) = u, and t = 1 - level.
    torch.testing.assert_close(CosMap().cdf(1 - level), 1 - u, rtol=1e-12, atol=1e-12)


@EVERY
def test_sampling_is_weighting_by_the_density(name):
    """E over the sampler of l = E over uniform times of density * l, by quadrature and by draws."""
    sampler = SAMPLERS[name]

    def loss(t):
        return 1 + t**2 - torch.cos(5 * t)

    weighted = integral(lambda t: sampler.density(t) * loss(t))
    drawn = loss(sampler.sample(200_000, generator=torch.Generator().manual_seed(3)).double())
    # Four standard errors of the mean.
    assert float(drawn.mean()) == pytest.approx(weighted, abs=4 * float(drawn.std()) / 200_000**0.5)


def test_diffusers_arguments_mean_what_its_training_script_does():
    # The script: u = sigmoid(N(mean, std)), then the u-th of the falling, shifted noise levels.
    mean, std, shift = 0.8, 0.6, 3.0
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.linspace(1, 1000, 1000, dtype=torch.float64).flip(0) / 1000
    levels = shift * steps / (1 + (shift - 1) * steps)
    level = levels[(torch.sigmoid(mean + std * normal) * 1000).long()]
    sampler = from_diffusers_args("logit_normal", logit_mean=mean, logit_std=std, shift=shift)
    assert sampler == TimeShift(3.0, LogitNormal(-0.8, 0.6))
    # Levels are a grid of thousandths, so compare distributions to that and a sampling error.
    for t in (0.3, 0.5, 0.7):
        share = float((1 - level <= t).double().mean())
        assert float(sampler.cdf(torch.tensor(t))) == pytest.approx(share, abs=0.015)
    assert from_diffusers_args("mode", mode_scale=1.0) == Mode(1.0)
    assert from_diffusers_args() == Uniform()
    assert from_diffusers_args("cosmap") == CosMap()
    s = torch.tensor(0.3)
    weight = 2 / (math.pi * (1 - 2 * s + 2 * s**2))
    torch.testing.assert_close(CosMap().density(s), weight)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="std must be > 0"):
        LogitNormal(0.0, 0.0)
    for scale in (-1.01, 1.76):
        with pytest.raises(ValueError, match=r"scale must be from -1 to 1\.7519"):
            Mode(scale)
    with pytest.raises(ValueError, match="did you mean 'logit_normal'"):
        from_diffusers_args("logitnormal")
    with pytest.raises(ValueError, match="no finite integral"):
        from_diffusers_args("sigma_sqrt")
    with pytest.raises(ValueError, match="shifted by 3"):
        from_diffusers_args("cosmap", shift=3.0)
