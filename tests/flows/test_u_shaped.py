import math
import warnings

import pytest
import torch
from scipy import stats

from rectiflow.flows import (
    FlowModel,
    Independent,
    LivePairs,
    MinibatchOT,
    PairSymmetry,
    UShaped,
)
from rectiflow.flows.times import TimeSampler, Uniform
from rectiflow.training import FlowMatching

SHAPES = [UShaped(), UShaped(1.0), UShaped(12.0), UShaped(4.0, margin=0.1), UShaped(0.0)]


def test_published_values():
    # Specification: p(0) = p(1) = 2.0746294, p(0.2) = 0.99846995, p(0.5) = 0.5514411 at a = 4.
    t = torch.tensor([0.0, 1.0, 0.2, 0.5], dtype=torch.float64)
    wanted = torch.tensor([2.0746294, 2.0746294, 0.99846995, 0.5514411], dtype=torch.float64)
    torch.testing.assert_close(UShaped(4.0).density(t), wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("times", SHAPES, ids=str)
def test_invariant_1_density_has_integral_one_and_is_symmetric(times):
    low, high = times.margin, 1 - times.margin
    grid = torch.linspace(low, high, 20_001, dtype=torch.float64)
    density = times.density(grid)
    # Trapezoids on 20,000 cells: a² / (12 n²) of relative error, 3e-8 at a = 12.
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-7)
    torch.testing.assert_close(density, density.flip(0), rtol=1e-9, atol=1e-9)
    outside = torch.tensor([-0.01, 1.01])
    assert times.density(outside).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("times", SHAPES, ids=str)
def test_invariant_1_samples_follow_the_distribution(times):
    drawn = times.sample(20_000, generator=torch.Generator().manual_seed(3)).double()
    assert float(drawn.min()) >= times.margin
    assert float(drawn.max()) <= 1 - times.margin
    found = stats.kstest(drawn.numpy(), lambda t: times.cdf(torch.as_tensor(t)).numpy())
    assert found.pvalue > 0.01


@pytest.mark.parametrize("times", SHAPES, ids=str)
def test_distribution_function_is_the_integral_of_the_density(times):
    t = torch.linspace(0.11, 0.89, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(times.cdf(t).sum(), t)
    torch.testing.assert_close(slope, times.density(t.detach()), rtol=1e-9, atol=1e-9)
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(times.cdf(ends), ends)


def test_invariant_1_vanishing_a_is_uniform():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(UShaped(1e-4).density(t), Uniform().density(t), rtol=1e-8, atol=0)
    pair = [
        times.sample(100, generator=torch.Generator().manual_seed(0))
        for times in (UShaped(0.0), Uniform())
    ]
    assert torch.equal(*pair)


@pytest.mark.parametrize("a", [0.5, 4.0, 30.0])
def test_invariant_1_middle_against_ends(a):
    middle, end = UShaped(a).density(torch.tensor([0.5, 0.0], dtype=torch.float64)).tolist()
    assert middle / end == pytest.approx(1 / math.cosh(a / 2), rel=1e-10)


def test_mixture_of_the_official_code_has_the_same_density():
    # An exponential e with density a exp(a e) / (exp(a) - 1), mirrored with probability 1/2.
    a, generator = 4.0, torch.Generator().manual_seed(0)
    u, coin = torch.rand(2, 20_000, generator=generator, dtype=torch.float64)
    e = torch.log1p(u * math.expm1(a)) / a
    drawn = torch.where(coin < 0.5, e, 1 - e)
    found = stats.kstest(drawn.numpy(), lambda t: UShaped(a).cdf(torch.as_tensor(t)).numpy())
    assert found.pvalue > 0.01


def test_extreme_a_stays_finite():
    times = UShaped(100.0)
    drawn = times.sample(1000, generator=torch.Generator().manual_seed(0))
    assert drawn.isfinite().all()
    assert times.density(drawn).isfinite().all()


def test_it_is_a_time_sampler():
    assert isinstance(UShaped(), TimeSampler)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="a must be >= 0, got -1"):
        UShaped(-1.0)
    with pytest.raises(ValueError, match="a must be at most 100, got 200"):
        UShaped(200.0)
    with pytest.raises(ValueError, match=r"margin must be in \[0, 0.5\), got 0.5"):
        UShaped(margin=0.5)


def test_independent_pairs_make_a_method_warn():
    model, data = FlowModel(lambda x, t: x, shape=(2,)), torch.zeros(8, 2)
    flipped = PairSymmetry(MinibatchOT(Independent(data)))
    for coupling in (Independent(data), MinibatchOT(Independent(data)), flipped):
        with pytest.warns(UserWarning, match="U-shaped times are for pairs made by a flow"):
            FlowMatching(model, coupling, times=UShaped())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlowMatching(model, Independent(data))
        FlowMatching(model, LivePairs(model), times=UShaped())
