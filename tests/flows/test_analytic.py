import math

import pytest
import torch

from rectiflow.flows import (
    DormandPrince,
    Field,
    GaussianField,
    KernelField,
    SoftmaxField,
    integrate,
)
from rectiflow.flows.path_registry import build


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixture(data, x, t, std=1.0):
    """The log-density of `t x_i + (1 - t) std z`, term by term."""
    terms = []
    for point in data:
        normal = torch.distributions.Normal(t * point, std * (1 - t))
        terms.append(normal.log_prob(x).flatten(1).sum(1))
    return torch.stack(terms).logsumexp(0) - math.log(len(data))


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("std", [1.0, 2.0])
def test_invariant_4_softmax_field_is_the_score_of_the_mixture(t, std):
    data, x = random(7, 2, 3), random(5, 2, 3, seed=1).requires_grad_()
    field, times = SoftmaxField(data, std), torch.full((5,), t, dtype=torch.float64)
    density = mixture(data, x, t, std)
    (score,) = torch.autograd.grad(density.sum(), x)
    # noise = -std² sigma score, and the path turns noise into velocity.
    noise = -(std**2) * (1 - t) * score
    wanted = field.path.convert(noise, x, times, given="noise", wanted="velocity")
    torch.testing.assert_close(field.velocity(x, times), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(field.noise(x, times), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(field.log_density(x, times), density, rtol=1e-9, atol=1e-9)


def test_invariant_4_at_the_start_it_points_to_the_mean():
    data, x = random(7, 2), random(5, 2, seed=1)
    wanted = data.mean(0) - x
    torch.testing.assert_close(SoftmaxField(data).velocity(x, torch.zeros(5).double()), wanted)
    almost = SoftmaxField(data).velocity(x, torch.full((5,), 1e-9).double())
    torch.testing.assert_close(almost, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_it_is_the_analytic_teacher_of_slimflow(t):
    # v = (sum w_i x_i - x) / (1 - t), w = softmax(-|x - t x_i|² / (2 (1 - t)²)), written out.
    data, x = random(7, 2), random(5, 2, seed=1)
    squared = (x[:, None] - t * data[None]).square().sum(2)
    weights = torch.softmax(-squared / (2 * (1 - t) ** 2), dim=1)
    wanted = (weights @ data - x) / (1 - t)
    found = SoftmaxField(data).velocity(x, torch.full((5,), t, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_stable_near_the_end(dtype):
    data = random(7, 2).to(dtype)
    for t in (1 - 1e-3, 1 - 1e-6, 1.0):
        times, x = torch.full((7,), t, dtype=dtype), data + 0.1 * (1 - t)
        field = SoftmaxField(data)
        # Every point is far nearer to itself than to the others.
        torch.testing.assert_close(field.denoise(x, times), data)
        assert field.velocity(x, times).isfinite().all()
        assert field.velocity(x + 5, times).isfinite().all()
        assert field.velocity(x, times).dtype == dtype


def test_its_flow_ends_at_the_data():
    data, x = random(5, 2, seed=3), random(40, 2, seed=4)
    ended = integrate(SoftmaxField(data), x, 100)
    assert torch.cdist(ended, data).min(1).values.max() < 1e-3


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(chunk):
    data, x, t = random(7, 2), random(5, 2, seed=1), torch.linspace(0, 1, 5).double()
    whole, cut = SoftmaxField(data), SoftmaxField(data, chunk=chunk)
    torch.testing.assert_close(cut.velocity(x, t), whole.velocity(x, t))
    pairs = random(7, 2, seed=2), data
    whole, cut = (KernelField(*pairs, neighbours=4, chunk=size) for size in (100, chunk))
    torch.testing.assert_close(cut.velocity(x, t), whole.velocity(x, t))


def test_kernel_field_is_the_formula():
    source, target, x = random(9, 2), random(9, 2, seed=1), random(4, 2, seed=2)
    for neighbours in (9, 3):
        t = torch.tensor([0.0, 0.2, 0.7, 0.9]).double()
        rows = []
        for state, time in zip(x, t):
            squared = (time * target + (1 - time) * source - state).square().sum(1)
            nearest = squared.argsort()[:neighbours]
            weights = torch.exp(-squared[nearest] / (2 * 0.3))
            moves = (target[nearest] - state) / (1 - time)
            rows.append((weights[:, None] * moves).sum(0) / weights.sum())
        field = KernelField(source, target, bandwidth=0.3, neighbours=neighbours)
        torch.testing.assert_close(field.velocity(x, t), torch.stack(rows))


def test_kernel_field_approaches_the_exact_one():
    data, x = random(4, 1, seed=7), torch.linspace(-1, 1, 9).double().unsqueeze(1)
    t, errors = torch.full((9,), 0.5).double(), []
    exact = SoftmaxField(data).velocity(x, t)
    for count, bandwidth in ((400, 0.3), (40_000, 0.002)):
        target = data.repeat(count // 4, 1)
        field = KernelField(random(count, 1, seed=8), target, bandwidth, neighbours=count)
        errors.append((field.velocity(x, t) - exact).square().mean().sqrt())
    # The bias falls with the bandwidth; the noise is sqrt(1 / (40,000 x 0.1 x density)), about 3%.
    assert errors[1] < 0.1 * exact.square().mean().sqrt()
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 4, 4)])
def test_fields_take_any_shape(shape):
    data, x, t = random(6, *shape), random(2, *shape, seed=1), torch.tensor([0.1, 0.9]).double()
    fields = (
        SoftmaxField(data),
        KernelField(data, data.flip(0)),
        GaussianField(data[0], data[1].abs()),
    )
    for field in fields:
        assert isinstance(field, Field)
        path = field.path
        velocity, denoised = field.velocity(x, t), field.denoise(x, t)
        found = path.convert(velocity, x, t, given="velocity", wanted="data")
        torch.testing.assert_close(found, denoised)
        found = path.convert(velocity, x, t, given="velocity", wanted="noise")
        torch.testing.assert_close(found, field.noise(x, t))
        with pytest.raises(ValueError, match="takes no condition, got label"):
            field.velocity(x, t, label=torch.zeros(2))


def test_invariant_1_gaussian_velocity_is_the_formula():
    m, s, x = 0.7, 2.5, random(6, 1)
    t = torch.linspace(0, 1, 6).double()
    field = GaussianField(torch.tensor([m]).double(), torch.tensor([s]).double())
    u = t[:, None]
    wanted = m + (u * s**2 - (1 - u)) / ((1 - u) ** 2 + u**2 * s**2) * (x - u * m)
    torch.testing.assert_close(field.velocity(x, t), wanted)


def test_gaussian_field_equals_the_average_over_its_data():
    # Many points drawn at equal probability stand for the normal target.
    levels = (torch.arange(4000).double() + 0.5) / 4000
    data = (0.5 + 0.8 * math.sqrt(2) * torch.erfinv(2 * levels - 1)).unsqueeze(1)
    x, t = torch.linspace(-1, 1, 5).double().unsqueeze(1), torch.full((5,), 0.4).double()
    exact = GaussianField(torch.tensor([0.5]).double(), torch.tensor([0.8]).double())
    found = SoftmaxField(data).velocity(x, t)
    torch.testing.assert_close(found, exact.velocity(x, t), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "cosine", "edm"])
def test_gaussian_transport_is_the_flow_on_other_paths(name):
    field = GaussianField(torch.tensor([0.7]).double(), torch.tensor([0.5]).double(), build(name))
    x = field.path.start(random(5, 1))
    found = integrate(field, x, [0.0, 0.9], DormandPrince(rtol=1e-7, atol=1e-7))
    torch.testing.assert_close(found, field.transport(x, 0.0, 0.9), rtol=1e-5, atol=1e-5)


def test_gaussian_density_is_the_normal_one():
    field = GaussianField(torch.tensor([0.7, 0.0]).double(), torch.tensor([2.0, 1.0]).double())
    x = random(4, 2)
    normal = torch.distributions.Normal(field.mean, field.std)
    torch.testing.assert_close(field.log_density(x), normal.log_prob(x).sum(1))


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"data must hold points in rows \(n, ...\), got \(0, 2\)"):
        SoftmaxField(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="std must be > 0"):
        SoftmaxField(torch.zeros(1, 2), std=0.0)
    with pytest.raises(ValueError, match="sources and targets of one shape"):
        KernelField(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="bandwidth must be > 0"):
        KernelField(torch.zeros(3, 2), torch.zeros(3, 2), bandwidth=0.0)
    with pytest.raises(ValueError, match="std must be > 0 everywhere"):
        GaussianField(torch.zeros(1), torch.zeros(1))
