import math

import pytest
import torch
from torch import nn

from rectiflow.flows import (
    FlowModel,
    GaussianField,
    StochasticEuler,
    bits_per_dim,
    integrate,
    log_likelihood,
)
from rectiflow.flows.diffusion_paths import EDMPath
from rectiflow.flows.path_registry import build


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gaussian(path="rectified"):
    mean, std = torch.tensor([0.7, -1.0]).double(), torch.tensor([2.5, 0.4]).double()
    return GaussianField(mean, std, build(path))


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "heun"])
def test_invariant_5_gaussian_density(solver):
    field, x = gaussian(), random(9, 2)
    found = log_likelihood(field, x, 50, solver)
    tolerance = {"rk4": 1e-4, "heun": 2e-2, "dopri5": 1e-3}[solver]
    torch.testing.assert_close(found, field.log_density(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", ["vp", "cosine", "edm"])
def test_density_on_other_paths(path):
    # The source is reached only nearly: the mean at t = 0 is alpha(0) m, not 0.
    mean = 0.0 if path != "cosine" else 0.7
    field = GaussianField(torch.full((2,), mean).double(), torch.ones(2).double(), build(path))
    x, grid = random(5, 2), [0.0, 0.3, 0.6, 0.9, 0.99]
    found = log_likelihood(field, x, grid, "dopri5")
    torch.testing.assert_close(found, field.log_density(x, 0.99), rtol=1e-3, atol=2e-3)


def test_linear_field_in_three_dimensions():
    matrix, x = random(3, 3), random(6, 3, seed=1)
    found = log_likelihood(lambda x, t: x @ matrix.T, x, 100)
    start = x @ torch.linalg.matrix_exp(-matrix).T
    normal = -0.5 * start.square().sum(1) - 1.5 * math.log(2 * math.pi)
    # RK4 with a hundred steps errs by about (|A| / 100)^4.
    torch.testing.assert_close(found, normal - matrix.trace(), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_unbiased():
    matrix, x = random(3, 3), random(1, 3, seed=1).expand(2000, 3)
    field, generator = (lambda x, t: x @ matrix.T), torch.Generator().manual_seed(2)
    found = log_likelihood(
        field, x, 10, divergence="hutchinson", batch_size=2000, generator=generator
    )
    exact = log_likelihood(field, x[:1], 10)
    error = found.std() / math.sqrt(2000)
    assert error > 0.01
    assert abs(found.mean() - exact) < 3 * error
    many = log_likelihood(
        field, x[:400], 10, divergence="hutchinson", probes=16, generator=generator
    )
    # Sixteen probes have a quarter of the deviation of one.
    assert (many.std() / found.std()).item() == pytest.approx(0.25, rel=0.15)


def test_hutchinson_is_exact_for_diagonal_fields():
    field, x = gaussian(), random(4, 2)
    found = log_likelihood(field, x, 20, divergence="hutchinson")
    torch.testing.assert_close(found, log_likelihood(field, x, 20))


class Net(nn.Module):
    """Convolution, dropout and a label, as real networks have."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t, *, label):
        shift = (t * label).reshape(-1, 1, 1, 1)
        return self.drop(torch.tanh(self.mix(x) + shift))


def test_models_on_images_equal_the_trace_of_the_jacobian():
    torch.manual_seed(0)
    model = FlowModel(Net().double().train(), shape=(1, 2, 3))
    x, label = random(3, 1, 2, 3), torch.tensor([0.0, 1.0, 2.0]).double()
    found = log_likelihood(model, x, 3, "euler", label=label, batch_size=2)
    assert model.training
    model.eval()
    state, total = x, torch.zeros(3).double()
    for t in (1.0, 2 / 3, 1 / 3):
        for i in range(3):
            time = torch.tensor([t]).double()

            def at(s, i=i, time=time):
                return model.velocity(s[None], time, label=label[i : i + 1])[0]

            jacobian = torch.autograd.functional.jacobian(at, state[i])
            total[i] -= jacobian.reshape(6, 6).trace() / 3
        times = torch.full((3,), t).double()
        state = state - model.velocity(state, times, label=label) / 3
    normal = -0.5 * state.flatten(1).square().sum(1) - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(found, (normal + total).detach())


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_samples_do_not_depend_on_their_neighbours(divergence):
    def likelihood(x, size):
        return log_likelihood(
            lambda x, t: torch.sin(x @ torch.ones(2, 2).double()),
            x,
            5,
            divergence=divergence,
            batch_size=size,
            generator=torch.Generator().manual_seed(0),
        )

    x = random(6, 2)
    together = likelihood(x, 6)
    torch.testing.assert_close(likelihood(x, 4), together)
    torch.testing.assert_close(likelihood(x[:3], 6), together[:3])


def test_probability_sums_to_one():
    grid = torch.linspace(-12, 12, 1201).double()
    field = GaussianField(torch.tensor([1.0]).double(), torch.tensor([2.0]).double())
    density = log_likelihood(field, grid.unsqueeze(1), 50, batch_size=2000).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-5)


def test_bits_per_dim_of_a_uniform_density():
    # A uniform density on [-1, 1]^d is 2^-d: 8 bits for 256 levels.
    nats = torch.full((2,), -3 * math.log(2))
    torch.testing.assert_close(bits_per_dim(nats, 3), torch.full((2,), 8.0))
    torch.testing.assert_close(bits_per_dim(nats, 3, levels=None), torch.ones(2))


def test_misuse_is_refused():
    field, x = gaussian(), random(2, 2)
    with pytest.raises(ValueError, match="unknown divergence 'exakt': did you mean 'exact'"):
        log_likelihood(field, x, divergence="exakt")
    with pytest.raises(ValueError, match=r"times that reach 0, got 0.1 to 1"):
        log_likelihood(field, x, [0.1, 1.0])
    with pytest.raises(ValueError, match="probes must be > 0"):
        log_likelihood(field, x, probes=0)
    with pytest.raises(ValueError, match="forward in time only"):
        log_likelihood(field, x, 2, StochasticEuler(path=EDMPath()))
    torch.testing.assert_close(
        log_likelihood(field, x, [1.0, 0.5, 0.0]), log_likelihood(field, x, 2)
    )
    assert not integrate(field, x, 1).requires_grad
