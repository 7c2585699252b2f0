"""Clips, weights, features and the discriminator: closed forms and limits."""

from __future__ import annotations

import math

import pytest
import torch
from tests.stirring import stirred
from torch import nn

from rectiflow.distill.density_ratio import (
    Discriminator,
    Features,
    Judge,
    RatioClip,
    constant_ratio,
    default_features,
    discriminator_loss,
)
from rectiflow.distill.divergences import DIVERGENCES
from rectiflow.distill.lora import with_lora
from rectiflow.distill.ratio_weights import RatioWeights
from rectiflow.flows import FlowModel
from rectiflow.nets import MLP, DiffusionVelocity, Stacked, UNet


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_invariant_5_trained_to_its_optimum_it_gives_the_log_ratio():
    # p = N(1, 1), q = N(-1, 1): log p/q = 2 x.
    real, fake = random(2000, 1, seed=1) + 1, random(2000, 1, seed=2) - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Discriminator([(1,)], width=16, depth=1)
    optimizer = torch.optim.Adam(net.parameters(), 5e-2)
    for _ in range(120):
        loss = discriminator_loss(net([fake]), net([real]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.linspace(-1.5, 1.5, 31).unsqueeze(1)
    with torch.no_grad():
        error = (net([x]) - 2 * x.squeeze(1)).abs()
    # Logits go from -3 to 3; 2,000 samples place them to about 0.1.
    assert error.mean() < 0.2
    # The least loss of two normals two standard deviations apart, by quadrature.
    grid = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.exp(-0.5 * (grid - 1) ** 2) / math.sqrt(2 * math.pi)
    least = 2 * float(torch.trapezoid(density * nn.functional.softplus(-2 * grid), grid))
    assert float(loss.detach()) == pytest.approx(least, abs=0.05)


def test_invariant_8_clips_are_kept_and_odd_logits_are_safe():
    logits = torch.tensor([-math.inf, -1e30, -1.0, 0.0, 1.0, 1e30, math.inf, math.nan])
    ratio = RatioClip()(logits)
    assert ratio.isfinite().all()
    torch.testing.assert_close(
        ratio, torch.tensor([0.1, 0.1, math.exp(-1), 1.0, math.e, 20.0, 20.0, 1.0])
    )
    narrow = RatioClip(logit=0.5, low=0.01, high=100.0)(logits)
    torch.testing.assert_close(narrow.max(), torch.tensor(math.exp(0.5)))
    assert RatioClip()(torch.zeros(2, dtype=torch.float16)).dtype == torch.float32
    assert not RatioClip()(torch.zeros(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("options", [{"low": 0.0}, {"low": 2.0}, {"high": 0.5}])
def test_clips_must_hold_the_ratio_one(options):
    with pytest.raises(ValueError, match="ratio bounds need 0 < low <= 1 <= high"):
        RatioClip(**options)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_invariants_2_and_4_weights_have_mean_one(name):
    t = torch.rand(500, generator=torch.Generator().manual_seed(0))
    ratio = RatioClip()(3 * random(500))
    for weights in (RatioWeights(), RatioWeights(ema=0.0), RatioWeights(bins=0)):
        found = weights(ratio, t, DIVERGENCES[name])
        assert found.mean().item() == pytest.approx(1, abs=1e-4)
        assert bool((found >= 0).all())
    equal = RatioWeights(ema=0.0)(torch.full((500,), 3.7), t, DIVERGENCES[name])
    torch.testing.assert_close(equal, torch.ones(500), rtol=1e-6, atol=0)


def test_weights_of_equal_ratios_are_exactly_one_where_they_are_constant():
    found = RatioWeights()(RatioClip()(random(64)), torch.rand(64), DIVERGENCES["rkl"])
    assert torch.equal(found, torch.ones(64))


def test_invariant_9_only_bins_that_hold_samples_move():
    weights = RatioWeights(bins=4, ema=0.75, low=0.2, high=1.0)
    ratio, t = torch.tensor([2.0, 4.0, 8.0]), torch.tensor([0.25, 0.39, 0.9])
    weights(ratio, t, DIVERGENCES["kl"])
    # 0.75 of one plus 0.25 of the bin's mean: 3 in the first bin, 8 in the last.
    torch.testing.assert_close(weights.means, torch.tensor([1.5, 1.0, 1.0, 2.75]))
    weights(ratio[:1], t[:1], DIVERGENCES["kl"])
    torch.testing.assert_close(weights.means, torch.tensor([1.625, 1.0, 1.0, 2.75]))


def test_ratios_are_divided_by_the_mean_of_their_bin():
    weights = RatioWeights(bins=2, ema=0.0)
    ratio, t = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.tensor([0.1, 0.2, 0.8, 1.0])
    found = weights(ratio, t, DIVERGENCES["kl"])
    torch.testing.assert_close(found, torch.tensor([0.5, 1.5, 0.5, 1.5]))
    # Without the first stage the later bin rules.
    flat = RatioWeights(bins=0)(ratio, t, DIVERGENCES["kl"])
    torch.testing.assert_close(flat, ratio / 11)


def test_times_outside_the_bins_count_to_the_nearest():
    weights = RatioWeights(bins=3, ema=0.0, low=0.3, high=0.6)
    weights(torch.tensor([2.0, 5.0]), torch.tensor([0.0, 1.0]), DIVERGENCES["kl"])
    assert weights.means.tolist() == [2.0, 1.0, 5.0]


def test_means_are_part_of_the_state():
    weights = RatioWeights(bins=2)
    weights(torch.tensor([5.0]), torch.tensor([0.1]), DIVERGENCES["js"])
    twin = RatioWeights(bins=2)
    twin.load_state_dict(weights.state_dict())
    assert torch.equal(twin.means, weights.means)
    assert not torch.equal(twin.means, torch.ones(2))


@pytest.mark.parametrize("options", [{"bins": -1}, {"ema": 1.0}, {"low": 1.0}])
def test_wrong_weights_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        RatioWeights(**options)


def test_named_features_are_read_during_the_evaluation():
    net = MLP(shape=(2,), width=8, depth=2, zero=False)
    x, t = random(5, 2), torch.rand(5)
    calls = []
    net.blocks[0].register_forward_hook(lambda m, given, out: calls.append(out))
    features = Features(["blocks.0", "blocks.1"], net)
    output, seen = features.watch(lambda: net(x, t), x, t, {})
    assert len(calls) == 1
    assert torch.equal(seen[0], calls[0])
    assert seen[1].shape == (5, 8)
    assert torch.equal(output, net(x, t))
    assert len(net.blocks[1]._forward_hooks) == 0, "the hook must be gone"


def test_first_rows_of_a_guided_evaluation_count():
    net = MLP(shape=(2,), width=8, depth=1, zero=False)
    x, t = random(5, 2), torch.rand(5)
    features = Features("blocks.0", net)
    plain = features.watch(lambda: net(x, t), x, t, {})[1][0]
    twice = features.watch(lambda: net(torch.cat([x, -x]), torch.cat([t, t])), x, t, {})[1][0]
    torch.testing.assert_close(twice, plain)


def test_features_may_be_a_function():
    features = Features(lambda x, t, **condition: (x * 2, t.unsqueeze(1)))
    result, seen = features.watch(lambda: "estimate", torch.ones(3, 2), torch.zeros(3), {})
    assert result == "estimate"
    assert [tuple(s.shape) for s in seen] == [(3, 2), (3, 1)]


def test_unknown_features_are_named():
    with pytest.raises(ValueError, match=r"unknown module of MLP 'block\.0': did you mean"):
        Features("block.0", MLP(shape=(2,), width=8, depth=1))
    with pytest.raises(ValueError, match="has no network to look into"):
        Features("blocks.0")
    with pytest.raises(ValueError, match="no module of Linear is known to give features"):
        default_features(nn.Linear(2, 2))
    net = MLP(shape=(2,), width=8, depth=1)
    with pytest.raises(ValueError, match="was not called"):
        Features("blocks.0", net).watch(lambda: None, torch.zeros(1, 2), torch.zeros(1), {})


def test_middle_of_a_unet_feeds_convolutions():
    net = UNet(shape=(1, 28, 28), width=8, multipliers=(1, 2, 2), blocks=1, attention=())
    assert default_features(net) == "middle.1"
    judge = Judge(FlowModel(net, shape=(1, 28, 28)))
    x, t = random(3, 1, 28, 28), torch.rand(3)
    (seen,) = judge.look(x, t, {})
    assert seen.shape == (3, 16, 7, 7)
    judge.discriminator = Discriminator([seen.shape[1:]])
    with torch.no_grad():
        judge.discriminator.heads[0][-1].weight.normal_()
    assert judge.logits(x, t, {}).shape == (3,)


@pytest.mark.parametrize("side", [1, 3, 4, 8, 13])
def test_heads_take_maps_of_any_size(side):
    net = Discriminator([(6, side, side + 1)])
    assert net([torch.randn(2, 6, side, side + 1)]).shape == (2,)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_logits_of_maps_tell_them_apart(width):
    net = stirred(Discriminator([(width, 8, 8)]), 0.3)
    maps = random(3, width, 8, 8)
    with torch.no_grad():
        logits = net.train()([maps])
        assert float((logits[0] - logits[1]).abs()) > 1e-3
        torch.testing.assert_close(net([maps[:1]]), logits[:1])
        # Not the signs alone: a map twice as large has another logit.
        wide = net([3 * maps[:1]])
    assert float((wide - logits[:1]).abs()) > 1e-3


def test_heads_take_tokens_and_average():
    net = Discriminator([(5, 6), (4,)], width=8)
    with torch.no_grad():
        net.heads[1][-1].bias.fill_(3.0)
    torch.testing.assert_close(
        net([torch.randn(2, 5, 6), torch.randn(2, 4)]), torch.full((2,), 1.5)
    )
    with pytest.raises(ValueError, match=r"features must be vectors .* got shape \(1, 2, 3, 4\)"):
        Discriminator([(1, 2, 3, 4)])


def test_default_features_are_found_inside_wrappers():
    net = MLP(shape=(2,), width=8, depth=2)
    assert default_features(DiffusionVelocity(net=net)) == "net.blocks.1"
    assert default_features(Stacked.of(net)) == "first.blocks.1"
    judge = Judge(FlowModel(DiffusionVelocity(net=net), shape=(2,)))
    assert judge.look(random(3, 2), torch.rand(3), {})[0].shape == (3, 8)


def test_default_features_are_found_beside_adapters():
    pytest.importorskip("peft")
    thin = with_lora(FlowModel(MLP(shape=(2,), width=8, depth=2), shape=(2,)), 2, ["inner"])
    assert default_features(thin.net) == "net.blocks.1"
    assert Judge(thin).look(random(3, 2), torch.rand(3), {})[0].shape == (3, 8)


def test_estimate_keeps_gradients_to_the_state_and_off_all_weights():
    model = FlowModel(MLP(shape=(2,), width=8, depth=1, zero=False), shape=(2,)).train()
    judge = Judge(model)
    judge.discriminator = Discriminator([(8,)])
    with torch.no_grad():
        judge.discriminator.heads[0][-1].weight.normal_()
    x = random(4, 2).requires_grad_(True)
    t = torch.rand(4)
    estimate, logits = judge.estimate(x, t, {}, gradient=True)
    assert not estimate.requires_grad
    torch.testing.assert_close(estimate, model.denoise(x, t).detach())
    logits.sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    for module in (model, judge.discriminator):
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert model.training
    assert not judge.estimate(x, t, {}, gradient=False)[1].requires_grad
    judge.logits(x.detach(), t, {}).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in judge.discriminator.parameters())


def test_constant_ratio_is_one():
    assert torch.equal(RatioClip()(constant_ratio(torch.ones(3, 2), torch.zeros(3))), torch.ones(3))
