import sys
import types

import pytest
import torch
from torch import nn

from rectiflow.errors import MissingExtraError
from rectiflow.flows import (
    FeatureDistance,
    FlowModel,
    Perceptual,
    PerceptualHuber,
    PseudoHuber,
    RectifiedPath,
    Regression,
    VariancePreservingPath,
    lpips_distance,
)
from rectiflow.training.evaluation.feature_net import FeatureNet


def regression(output, *, t=None, path=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, *output.shape, generator=generator, dtype=torch.float64)
    t = torch.rand(len(output), generator=generator, dtype=torch.float64) if t is None else t
    path = path or RectifiedPath()
    x = path.interpolate(source, target, t)
    wanted = path.velocity(source, target, t)
    return Regression(output, wanted, x, t, target, path, "velocity")


def random(*shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def squared(images, others):
    return (images - others).square().flatten(1).sum(1)


class Squared:
    """A distance with a known value."""

    distance = staticmethod(squared)


class Nothing:
    """A distance that sees nothing."""

    @staticmethod
    def distance(images, others):
        return 0 * squared(images, others)


def test_formula_in_the_papers_terms():
    given = regression(random(4, 3))
    noise = 1 - given.t  # the paper's t
    # z = (1 - t) x + t n and v = n - x there, so x_hat = z - t v.
    estimate = given.x - noise[:, None] * -given.output
    seen = squared(estimate, given.target)
    huber = (1 - noise) * PseudoHuber(0.3)(given)
    torch.testing.assert_close(PerceptualHuber(Squared(), c=0.3)(given), huber + seen)
    inverse = PerceptualHuber(Squared(), inverse_time=True, c=0.3)
    torch.testing.assert_close(inverse(given), huber + seen / noise)
    torch.testing.assert_close(Perceptual(Squared())(given), seen)


@pytest.mark.parametrize("inverse_time", [False, True])
def test_invariant_6_without_perception_only_huber_is_left(inverse_time):
    given = regression(random(6, 5))
    loss = PerceptualHuber(Nothing(), inverse_time, c=0.1)(given)
    torch.testing.assert_close(loss, given.t * PseudoHuber(0.1)(given))


def test_invariant_5_huber_bounds_hold_inside():
    # Small differences: |d|² / (2 c n); large ones: (|d| - c) / n; gradient at most 1 / n.
    t = torch.ones(3, dtype=torch.float64)  # no noise, so the factor of Huber is 1
    base = regression(torch.zeros(3, 4, dtype=torch.float64), t=t)
    loss = PerceptualHuber(Nothing(), c=0.5)
    for size, wanted in (
        (1e-4, lambda d: d.square().sum(1) / (2 * 0.5 * 4)),
        (1e6, lambda d: (d.norm(dim=1) - 0.5) / 4),
    ):
        difference = size * random(3, 4)
        output = (base.wanted + difference).requires_grad_()
        found = loss(regression(output, t=t))
        # The next term is smaller by |d|² / (4 c²), 1e-7 here.
        torch.testing.assert_close(found, wanted(difference), rtol=1e-6, atol=0)
        found.sum().backward()
        assert (output.grad.norm(dim=1) <= 1 / 4 + 1e-12).all()


def test_other_paths_take_the_noise_level_of_equal_signal():
    given = regression(random(4, 3), path=VariancePreservingPath())
    alpha, sigma = given.path.alpha(given.t), given.path.sigma(given.t)
    huber = alpha / (alpha + sigma) * PseudoHuber(0.2)(given)
    torch.testing.assert_close(PerceptualHuber(Nothing(), c=0.2)(given), huber)


def test_noise_free_end_stays_finite():
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    output = random(2, 3).requires_grad_()
    loss = PerceptualHuber(nn.Identity(), inverse_time=True)(regression(output, t=t))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert output.grad.isfinite().all()


def test_feature_distance_by_hand():
    a, b = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=6)

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    wanted = (unit(a) - unit(b)).square().sum(1).mean((1, 2))
    # The constant under the root changes the length by 1e-10 of its square.
    torch.testing.assert_close(FeatureDistance(lambda x: x).distance(a, b), wanted)
    both = FeatureDistance(lambda x: (x, x)).distance(a, b)
    torch.testing.assert_close(both, wanted)
    assert FeatureDistance(lambda x: x).distance(a, a).abs().max() == 0


def test_network_is_frozen_and_evaluated_and_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Dropout(0.9)).double().train()
    output = random(3, 6).requires_grad_()
    loss = PerceptualHuber(net)
    first, second = (loss(regression(output)) for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()
    assert output.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training


def test_gradients_match_finite_differences():
    matrix = random(5, 4, seed=7)
    loss = PerceptualHuber(lambda x: torch.tanh(x @ matrix.T), inverse_time=True, c=0.2)
    output = random(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: loss(regression(o)), output)


def test_features_of_the_evaluation_net_serve():
    net = FeatureNet((1, 8, 8), 10).double()
    output = random(2, 1, 8, 8).requires_grad_()
    PerceptualHuber(net)(regression(output)).sum().backward()
    assert output.grad.abs().sum() > 0


def test_features_without_gradient_are_refused():
    loss = PerceptualHuber(torch.no_grad()(lambda x: 2 * x))
    with pytest.raises(ValueError, match="the features give no gradient: pass the network itself"):
        loss(regression(random(2, 3).requires_grad_()))


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="c must be > 0, got 0"):
        PerceptualHuber(nn.Identity(), c=0.0)


def test_lpips_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lpips is not installed.*rectiflow\[lpips\]"):
        lpips_distance()


@pytest.fixture
def stand_in(monkeypatch):
    """A package of that name whose network is a pooled mean of absolute differences."""

    class LPIPS(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.net, self.seen = net, []
            self.body = nn.Sequential(nn.Conv2d(3, 2, 1), nn.MaxPool2d(2, 2))

        def forward(self, images, others):
            self.seen.append(images)
            return (self.body(images) - self.body(others)).abs().mean((1, 2, 3), keepdim=True)

    made = types.ModuleType("lpips")
    made.LPIPS = LPIPS
    made.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "lpips", made)


def test_lpips_gets_three_channels_of_the_right_size(stand_in):
    distance = lpips_distance("alex", size=20)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    found = distance.distance(images, images.flip(0))
    assert found.shape == (2,)
    assert distance.net.net == "alex"
    (seen,) = distance.net.seen
    assert seen.shape == (2, 3, 20, 20)
    wanted = nn.functional.interpolate(images, (20, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, wanted.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="images of 1 or 3 channels, got 2"):
        distance.distance(images.expand(-1, 2, -1, -1), images.expand(-1, 2, -1, -1))


def test_lpips_pools_by_means_and_is_frozen(stand_in):
    distance = lpips_distance()
    assert isinstance(distance.net.body[1], nn.AvgPool2d)
    assert not any(p.requires_grad for p in distance.net.parameters())
    kept = lpips_distance(average_pooling=False, size=None)
    assert isinstance(kept.net.body[1], nn.MaxPool2d)
    images = torch.rand(2, 3, 8, 8).requires_grad_()
    loss = PerceptualHuber(kept)
    path, t = RectifiedPath(), torch.full((2,), 0.5)
    loss(Regression(images, images.detach(), images, t, images.detach(), path, "velocity"))
    assert kept.net.seen[0].shape == (2, 3, 8, 8)


def test_features_see_the_estimate_of_other_predictions():
    model = FlowModel(lambda x, t: x, prediction="data")
    output = random(2, 3)
    base = regression(output)
    given = Regression(output, base.target, base.x, base.t, base.target, model.path, "data")
    torch.testing.assert_close(Perceptual(Squared())(given), squared(output, base.target))


def test_huber_is_that_of_velocities_whatever_is_predicted():
    output = random(3, 4)
    base = regression(output)
    path = base.path
    as_data = path.convert(output, base.x, base.t, given="velocity", wanted="data")
    given = Regression(as_data, base.target, base.x, base.t, base.target, path, "data")
    loss = PerceptualHuber(Squared(), c=0.3)
    torch.testing.assert_close(loss(given), loss(base), rtol=1e-4, atol=1e-5)
