"""Losses of the implied data and noise."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import L2, DataPseudoHuber, NoiseL2, Regression
from rectiflow.flows.diffusion_paths import CosinePath, VariancePreservingPath
from rectiflow.flows.path_registry import PATHS, build
from rectiflow.flows.paths import PREDICTIONS


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def regression(output, path, prediction):
    source, target = random(*output.shape, seed=1), random(*output.shape, seed=2)
    t = torch.linspace(0.15, 0.85, len(output), dtype=torch.float64)
    x = path.interpolate(source, target, t)
    wanted = path.target_of(prediction, source, target, t)
    return Regression(output, wanted, x, t, target, path, prediction), source


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", sorted(PATHS))
def test_both_compare_what_the_prediction_implies(name, prediction):
    path = build(name)
    given, source = regression(random(4, 3), path, prediction)
    data = given.estimate - given.target
    noise = path.convert(given.output, given.x, given.t, given=prediction, wanted="noise") - source
    wanted = ((data.square() + 0.01).sqrt() - 0.1).mean(1)
    torch.testing.assert_close(DataPseudoHuber(0.1)(given), wanted, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(NoiseL2()(given), noise.square().mean(1), rtol=1e-7, atol=1e-9)


def test_noise_loss_of_a_noise_prediction_is_plain():
    given, _ = regression(random(4, 3), VariancePreservingPath(), "noise")
    assert torch.equal(NoiseL2()(given), L2()(given))


def shifted(difference):
    base, _ = regression(torch.zeros_like(difference), CosinePath(), "data")
    return regression(base.wanted + difference, CosinePath(), "data")[0]


def test_invariant_6_quadratic_for_small_and_linear_for_large():
    c = 0.5
    small, large = 1e-4 * random(5, 3), 1e6 * random(5, 3)
    # The next term is smaller by d² / (4 c²), about 1e-7.
    wanted = (small.square() / (2 * c)).mean(1)
    found = DataPseudoHuber(c)(shifted(small))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    wanted = (large.abs() - c).mean(1)
    torch.testing.assert_close(DataPseudoHuber(c)(shifted(large)), wanted, rtol=1e-9, atol=0)


def test_invariant_7_noise_errors_are_weighted_by_sigma_over_alpha():
    path, c = VariancePreservingPath(), 0.2
    output = random(6, 4).requires_grad_()
    given, _ = regression(output, path, "noise")
    DataPseudoHuber(c)(given).sum().backward()
    error = (given.estimate - given.target).detach()
    slope = error / (error.square() + c * c).sqrt() / 4
    weight = (path.sigma(given.t) / path.alpha(given.t))[:, None]
    torch.testing.assert_close(output.grad, -weight * slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("premetric", [DataPseudoHuber(0.3), NoiseL2()], ids=["data", "noise"])
def test_gradients_match_finite_differences(premetric):
    output = random(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o: premetric(regression(o, CosinePath(), "velocity")[0]), output
    )


@pytest.mark.parametrize("prediction", ["velocity", "data", "v"])
def test_losses_are_finite_at_the_ends(prediction):
    path, x = CosinePath(), torch.ones(2, 3)
    t = torch.tensor([0.0, 1.0])
    wanted = path.target_of(prediction, x, -x, t)
    output = torch.zeros(2, 3, requires_grad=True)
    given = Regression(output, wanted, path.interpolate(x, -x, t), t, -x, path, prediction)
    loss = DataPseudoHuber()(given).sum()
    loss.backward()
    assert loss.isfinite()
    assert output.grad.isfinite().all()


def test_the_turning_point_must_be_positive():
    with pytest.raises(ValueError, match="c must be > 0, got 0"):
        DataPseudoHuber(0.0)
