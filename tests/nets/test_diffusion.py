"""Diffusion networks as velocities: closed forms, both ends, and life as a network of ours."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from rectiflow.flows import FlowModel, GaussianField, integrate
from rectiflow.nets import DiffusionVelocity, build

SD = 0.6
DTYPE = torch.float64


class GaussianDiffusion(nn.Module):
    """The exact network of any family for data N(0, SD²), in the network's own terms.

    It computes in float64 whatever it is given, so that only the wrapper's rounding shows.
    """

    def __init__(self, family, output, sigma_data=0.5, betas=None):
        super().__init__()
        self.family, self.output, self.sigma_data, self.betas = family, output, sigma_data, betas

    def forward(self, y, clock):
        return self.exact(y.double(), clock.double()).to(y.dtype)

    def exact(self, y, clock):
        if self.output == "network":
            sigma = (4 * clock)[:, None].exp()
            total = sigma**2 + self.sigma_data**2
            unscaled = y * total.sqrt()
            data = SD**2 / (SD**2 + sigma**2) * unscaled
            skip = self.sigma_data**2 / total
            return (data - skip * unscaled) / (sigma * self.sigma_data / total.sqrt())
        if self.family == "vp":
            alpha, noise = self.schedule(clock)
        else:
            alpha, noise = torch.ones_like(clock)[:, None], clock[:, None]
        total = (alpha * SD) ** 2 + noise**2
        data, eps = alpha * SD**2 / total * y, noise / total * y
        return {
            "data": data,
            "noise": eps,
            "score": -eps / noise,
            "v": alpha * eps - noise * data,
        }[self.output]

    def schedule(self, clock):
        if self.betas is None:
            u = clock[:, None] / 999.0
            alpha = (-(u**2) * 19.9 / 4 - 0.1 * u / 2).exp()
            return alpha, (1 - alpha**2).sqrt()
        # Between two steps the log of noise over data is linear in the step.
        kept = torch.cumprod(1 - torch.tensor(self.betas, dtype=DTYPE), 0)
        ratio = 0.5 * ((1 - kept) / kept).log()
        low = clock.floor().long().clamp(max=len(kept) - 2)
        inside = clock - low
        sigma = (ratio[low] * (1 - inside) + ratio[low + 1] * inside).exp()[:, None]
        alpha = (1 + sigma**2).rsqrt()
        return alpha, sigma * alpha


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=DTYPE).tolist()
CASES = {
    "edm-network": {"family": "edm", "output": "network"},
    "edm-data": {"family": "edm", "output": "data"},
    "vp-noise": {"family": "vp", "output": "noise"},
    "vp-data": {"family": "vp", "output": "data"},
    "vp-score": {"family": "vp", "output": "score"},
    "vp-v": {"family": "vp", "output": "v"},
    "ddpm-noise": {"family": "vp", "output": "noise", "betas": BETAS},
    "ve-noise": {"family": "ve", "output": "noise", "sigma_min": 0.01, "sigma_max": 80.0},
    "ve-data": {"family": "ve", "output": "data", "sigma_min": 0.01, "sigma_max": 80.0},
    "ve-score": {"family": "ve", "output": "score", "sigma_min": 0.01, "sigma_max": 80.0},
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def wrapped(case):
    betas = case.get("betas")
    return DiffusionVelocity(
        net=GaussianDiffusion(case["family"], case["output"], betas=betas), **case
    )


def states(low=0.02, high=0.98, count=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, generator=generator, dtype=DTYPE)
    return x, torch.linspace(low, high, count, dtype=DTYPE)


def exact():
    return GaussianField(torch.zeros(3, dtype=DTYPE), torch.full((3,), SD, dtype=DTYPE))


@EVERY
def test_invariants_2_and_8_every_family_gives_the_closed_form_velocity(case):
    x, t = states()
    # Rounding is amplified by at most 1 / t or 1 / n, 50 here; the DDPM table by its float ends.
    torch.testing.assert_close(wrapped(case)(x, t), exact().velocity(x, t), rtol=1e-8, atol=1e-9)


def test_invariant_2_in_the_papers_terms():
    # v = z (t - (1 - t) sd²) / ((1 - t)² sd² + t²) with the paper's t = noise level, v = z - x.
    x, t = states()
    s = (1 - t)[:, None]
    wanted = -x * (s - (1 - s) * SD**2) / ((1 - s) ** 2 * SD**2 + s**2)
    torch.testing.assert_close(wrapped(CASES["edm-network"])(x, t), wanted)


def test_stable_form_equals_the_naive_one():
    net = wrapped(CASES["edm-network"])
    x, t = states()
    noise, time = (1 - t)[:, None], t[:, None]
    naive = (net.denoise(x / time, (1 - t) / t) - x) / noise
    torch.testing.assert_close(net(x, t), naive)


def test_both_ends_are_exact_for_the_preconditioned_network():
    net = wrapped(CASES["edm-network"]).float()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    # E[data] - noise at t = 0; data - E[noise] at t = 1.
    torch.testing.assert_close(net(x, torch.zeros(4)), -x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x, torch.ones(4)), x, rtol=1e-4, atol=1e-5)


def test_stable_form_keeps_its_digits_near_the_data():
    # float32 at t = 1 - 1e-4: the naive form loses four digits, this one none.
    x, t = states(1 - 1e-4, 1 - 1e-4)
    net = wrapped(CASES["edm-network"])
    wanted, found = net(x, t), net(x.float(), t.float())
    assert (found.double() - wanted).abs().max() < 2e-5


@EVERY
def test_ends_and_halves_stay_finite(case):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = wrapped(case).float()(x, torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


def test_clock_of_a_continuous_schedule():
    net = DiffusionVelocity(net=nn.Identity(), family="vp", output="noise", time_scale=1.0)
    u = torch.linspace(0.01, 1, 50, dtype=DTYPE)
    alpha = (-(u**2) * 19.9 / 4 - 0.1 * u / 2).exp()
    torch.testing.assert_close(net._clock((1 - alpha**2).sqrt() / alpha), u)


def test_clock_of_a_discrete_schedule_counts_its_steps():
    net = DiffusionVelocity(net=nn.Identity(), family="vp", output="noise", betas=BETAS)
    kept = torch.cumprod(1 - torch.tensor(BETAS, dtype=DTYPE), 0)
    steps = torch.tensor([0, 1, 500, 999])
    sigma = ((1 - kept[steps]) / kept[steps]).sqrt()
    torch.testing.assert_close(net._clock(sigma), steps.double(), rtol=1e-9, atol=1e-9)


def test_invariant_3_eulers_method_is_the_same_in_sigma_and_in_time():
    # dy / dsigma = (y - D) / sigma on y = x / t, sigma = (1 - t) / t: one and the same step.
    net = wrapped(CASES["edm-data"])
    grid = [0.1, 0.3, 0.35, 0.8, 0.97]
    x = states()[0]
    found = integrate(net, x, grid)
    y = x / grid[0]
    for before, after in pairwise(grid):
        sigma, then = (1 - before) / before, (1 - after) / after
        data = net.net(y, torch.full((len(y),), sigma, dtype=DTYPE))
        y = y + (then - sigma) * (y - data) / sigma
    torch.testing.assert_close(found, grid[-1] * y)


def test_training_gradient_reaches_the_inner_network():
    net = build("diffusion", net="mlp", options={"shape": [3], "width": 8, "depth": 1})
    x, t = torch.randn(4, 3), torch.rand(4)
    (net(x, t) - 1).square().mean().backward()
    assert net.net.head.weight.grad.abs().sum() > 0


def test_config_rebuilds_ours_and_says_nothing_of_foreign_ones(tmp_path):
    inner = {"shape": [3], "width": 8, "depth": 1, "zero": False}
    net = DiffusionVelocity(net="mlp", options=inner, family="vp", output="v", betas=[0.1, 0.2])
    stored = json.loads(json.dumps(net.config))
    assert stored == net.config
    twin = build(net.name, **stored)
    twin.load_state_dict(net.state_dict())
    x, t = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(twin(x, t), net(x, t))
    assert DiffusionVelocity(net=nn.Linear(2, 2)).config is None


def test_model_folders_hold_both_kinds(tmp_path):
    x, t = torch.randn(4, 3), torch.rand(4)
    ours = DiffusionVelocity(net=build("mlp", shape=(3,), width=8, depth=1, zero=False))
    FlowModel(ours, shape=(3,)).save_pretrained(tmp_path / "ours")
    again = FlowModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.velocity(x, t), ours(x, t))

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, y, clock):
            return self.layer(y) + clock[:, None]

    foreign = DiffusionVelocity(net=Foreign())
    FlowModel(foreign, shape=(3,)).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="a network of your own"):
        FlowModel.from_pretrained(tmp_path / "foreign")
    net = DiffusionVelocity(net=Foreign())
    again = FlowModel.from_pretrained(tmp_path / "foreign", net=net)
    assert torch.equal(again.velocity(x, t), foreign(x, t))


def test_one_hot_labels_reach_the_network():
    class Labelled(nn.Module):
        def forward(self, y, clock, class_labels=None):
            self.seen = class_labels
            return y

    net = DiffusionVelocity(net=Labelled(), classes=3, one_hot="class_labels")
    x, t = torch.zeros(3, 2), torch.full((3,), 0.5)
    net(x, t, label=torch.tensor([2, 0, 3]))
    assert net.net.seen.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    net(x.bfloat16(), t, label=torch.tensor([2, 0, 3]))
    assert net.net.seen.dtype == torch.bfloat16
    net(x, t)
    assert net.net.seen is None
    assert FlowModel(net).conditional
    assert net.null_condition(label=torch.tensor([1]))["label"].tolist() == [3]
    net.check(x, label=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"label must be from 0 to 2 .3 for none., got 0 to 4"):
        net.check(x, label=torch.tensor([0, 1, 4]))


def test_labels_of_our_networks_pass_through():
    net = DiffusionVelocity(net="mlp", options={"shape": [2], "width": 8, "depth": 1, "classes": 4})
    assert net.classes == 4
    assert net.null_condition(label=torch.tensor([1]))["label"].tolist() == [4]
    with pytest.raises(ValueError, match="label must be from 0 to 3"):
        net.check(torch.zeros(1, 2), label=torch.tensor([7]))
    with pytest.raises(ValueError, match="Identity has no null condition for text"):
        DiffusionVelocity(net=nn.Identity()).null_condition(text=torch.zeros(1))


def test_lower_precision_keeps_its_dtype():
    net = build("diffusion", net="mlp", options={"shape": [3], "width": 8, "depth": 1})
    x, t = torch.randn(4, 3), torch.tensor([0.0, 0.25, 0.5, 1.0])
    found = net.to(torch.bfloat16)(x.bfloat16(), t.bfloat16())
    assert found.dtype == torch.bfloat16
    # The network outputs 0; what is left is the linear term, to bfloat16's 8 bits.
    wanted = build("diffusion", net="mlp", options={"shape": [3], "width": 8, "depth": 1})(x, t)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "edn"}, "unknown family 'edn': did you mean 'edm'"),
        ({"family": "vp", "output": "network"}, "unknown output of a vp network 'network'"),
        ({"sigma_data": 0.0}, "sigma_data must be > 0"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max - sigma_min must be > 0"),
        ({"one_hot": "class_labels"}, "classes must be > 0"),
        ({"family": "vp", "output": "noise", "betas": [0.5]}, "betas must be two or more"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionVelocity(net=nn.Identity(), **options)


def test_denoiser_belongs_to_edm():
    net = DiffusionVelocity(net=nn.Identity(), family="vp", output="noise")
    with pytest.raises(ValueError, match="belongs to the edm family, got 'vp'"):
        net.denoise(torch.zeros(1, 2), torch.ones(1))
    assert math.isclose(net.sigmas[1], math.sqrt(math.expm1(2 * (19.9 / 4 + 0.05))))
