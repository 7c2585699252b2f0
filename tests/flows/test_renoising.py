"""The sampler of few-step generators and the exact field of a mixture."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.distill import generate_pairs
from rectiflow.flows import FlowModel, LivePairs, Renoise, integrate, sample
from rectiflow.flows.analytic import GaussianField
from rectiflow.flows.mixture import MixtureField
from rectiflow.flows.path_registry import build
from rectiflow.flows.solvers import fresh_noise


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", ["rectified", "vp", "edm", "cosine"])
def test_one_step_is_the_estimate_of_the_data(path):
    model = FlowModel(lambda x, t: 0.3 * x, build(path), "data", shape=(2,))
    z = noise(5, 2)
    found = integrate(model, model.path.start(z), 1, "renoise")
    # The velocity and back: 1 / alpha(0) of the rounding is left on the variance-preserving path.
    expected = model.denoise(model.path.start(z), torch.zeros(5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_steps_add_fresh_noise_to_the_estimate():
    seen = []

    def net(x, t):
        seen.append((x, t))
        return torch.full_like(x, 3.0)

    model = FlowModel(net, prediction="data", shape=(1,))
    generator = torch.Generator().manual_seed(1)
    z = noise(4000, 1)
    found = sample(
        model,
        source=z,
        steps=[0.0, 0.25, 1.0],
        solver="renoise",
        generator=generator,
        batch_size=4000,
    )
    torch.testing.assert_close(found, torch.full_like(z, 3.0))
    x, t = seen[1]
    assert torch.equal(t, torch.full((4000,), 0.25))
    # Mean 0.25 * 3, standard deviation 0.75, by four standard errors.
    assert x.mean().item() == pytest.approx(0.75, abs=4 * 0.75 / 4000**0.5)
    assert x.std().item() == pytest.approx(0.75, rel=0.05)
    assert (x * z).mean().abs() < 0.06, "the noise must be fresh"


def test_renoise_refuses_fields_without_a_path_and_falling_times():
    with pytest.raises(ValueError, match="renoise solver needs the field's path"):
        integrate(lambda x, t: x, noise(2, 1), 2, "renoise")
    field = GaussianField(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="forward in time only"):
        integrate(field, noise(2, 1), [1.0, 0.0], Renoise())


@pytest.mark.parametrize("path", ["rectified", "vp", "ve"])
def test_mixture_of_one_is_the_normal_field(path):
    mean, std = torch.tensor([[2.0, -1.0]]), 0.5
    one = GaussianField(mean[0], torch.tensor(std), build(path))
    mixture = MixtureField(mean, torch.ones(1), std, build(path))
    x, t = noise(6, 2), torch.linspace(0.1, 0.9, 6)
    for name in ("denoise", "noise", "velocity"):
        torch.testing.assert_close(
            getattr(mixture, name)(x, t), getattr(one, name)(x, t), rtol=1e-4, atol=1e-4
        )
    # Twice the same mode is one mode.
    twice = MixtureField(mean.repeat(2, 1), torch.tensor([0.3, 0.9]), std, build(path))
    torch.testing.assert_close(twice.denoise(x, t), mixture.denoise(x, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        twice.log_density(x, t), mixture.log_density(x, t), rtol=1e-5, atol=1e-5
    )


def test_mixture_density_and_estimate_belong_together():
    field = MixtureField(torch.tensor([[-2.0], [2.0]]), torch.tensor([0.6, 0.4]), 0.5)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(1)
    t = torch.full((4001,), 0.7, dtype=torch.float64)
    density = field.log_density(x, t).exp()
    assert float(torch.trapezoid(density, x.squeeze(1))) == pytest.approx(1, abs=1e-6)
    # Tweedie: the score of the density is -noise / sigma.
    x = x.requires_grad_(True)
    (score,) = torch.autograd.grad(field.log_density(x, t).sum(), x)
    torch.testing.assert_close(score, -field.noise(x.detach(), t) / 0.3, rtol=1e-8, atol=1e-8)


def test_mixture_refuses_shares_that_do_not_fit():
    with pytest.raises(ValueError, match="one share each"):
        MixtureField(torch.zeros(3, 2), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="must be > 0"):
        MixtureField(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), 1.0)
    assert math.isfinite(MixtureField(torch.zeros(2, 2), torch.ones(2), 1.0).std)


def test_noise_is_drawn_where_the_generator_is():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    found = fresh_noise(x, torch.Generator().manual_seed(3))
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    assert torch.equal(found, expected)
    assert found.dtype == x.dtype


@pytest.mark.parametrize("solver", ["sde", "renoise", Renoise(build("rectified"))])
def test_random_solvers_make_no_pairs(solver, tmp_path):
    model = FlowModel(lambda x, t: -x, shape=(2,))
    with pytest.raises(ValueError, match="take an ODE solver"):
        LivePairs(model, solver=solver)
    with pytest.raises(ValueError, match="take an ODE solver"):
        generate_pairs(model, tmp_path / "pairs", 4, solver=solver, gate=None)
