import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectiflow.flows import GaussianField
from rectiflow.flows.diffusion_paths import EDMPath
from rectiflow.flows.path_registry import PATHS, build
from rectiflow.flows.paths import PREDICTIONS, PacedPath

NAMES = sorted(PATHS)
PAIRS = [(a, b) for a in PREDICTIONS for b in PREDICTIONS]


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_invariant_6_derivatives_match_differences(name):
    path, h = build(name), 1e-6
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for value, slope in ((path.alpha, path.dalpha), (path.sigma, path.dsigma)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        # Rounding costs eps |f| / h = 2e-10 |f|; sigma reaches 80, and its third derivative 1e6.
        torch.testing.assert_close(slope(t), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name, source_end, target_end",
    [
        ("rectified", (0, 1), (1, 0)),
        ("cosine", (0, 1), (1, 0)),
        ("paced", (0, 1), (1, 0)),
        ("constant-speed-vp", (0, 1), (1, 0)),
        ("vp", (math.exp(-5.025), math.sqrt(1 - math.exp(-10.05))), (1, 0)),
        ("sub-vp", (math.exp(-5.025), 1 - math.exp(-10.05)), (1, 0)),
        ("edm", (1, 80), (1, 0.002)),
        ("ve", (1, 0.01 * math.sqrt(5000**2 - 1)), (1, 0)),
    ],
)
def test_invariant_6_end_points(name, source_end, target_end):
    path = build(name)
    for time, wanted in ((0.0, source_end), (1.0, target_end)):
        t = torch.tensor(time, dtype=torch.float64)
        found = (path.alpha(t).item(), path.sigma(t).item())
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_every_path_has_its_end_points_tested():
    marks = test_invariant_6_end_points.pytestmark
    assert sorted(row[0] for row in marks[0].args[1]) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given_as, wanted", PAIRS)
def test_conversions_agree_for_every_pair(name, given_as, wanted):
    path = build(name)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    source, target = numbers(19, 2, 3), numbers(19, 2, 3, seed=1)
    x = path.interpolate(source, target, t)
    truth = {kind: path.target_of(kind, source, target, t) for kind in PREDICTIONS}
    found = path.convert(truth[given_as], x, t, given=given_as, wanted=wanted)
    torch.testing.assert_close(found, truth[wanted], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_conversions_stay_finite_at_the_ends(name, dtype):
    path, x, output = build(name), numbers(2, 3).to(dtype), numbers(2, 3, seed=1).to(dtype)
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    for given_as, wanted in PAIRS:
        found = path.convert(output, x, t, given=given_as, wanted=wanted)
        assert found.isfinite().all(), (given_as, wanted)
        assert found.dtype == dtype


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_a_vanishing_speed_still_tells_the_data(power):
    path, data, noise = PacedPath(power), numbers(3, 2), numbers(3, 2, seed=1)
    t = torch.tensor([0.9, 0.99, 1.0], dtype=torch.float64)
    x, output = path.interpolate(noise, data, t), path.velocity(noise, data, t)
    found = path.convert(output, x, t, given="velocity", wanted="data")
    torch.testing.assert_close(found, data, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_gradient_of_the_log_density(name):
    field = GaussianField(numbers(3), numbers(3, seed=1).exp(), build(name))
    x, t = numbers(5, 3, seed=2).requires_grad_(), 0.6
    (wanted,) = torch.autograd.grad(field.log_density(x, t).sum(), x)
    times = torch.full((5,), t, dtype=torch.float64)
    for kind in ("velocity", "noise"):
        output = getattr(field, kind)(x, times)
        found = field.path.convert(output, x, times, given=kind, wanted="score")
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_start_is_the_path_without_its_target(name):
    path, source = build(name), numbers(4, 2)
    wanted = path.interpolate(source, torch.zeros_like(source), torch.zeros(4).double())
    torch.testing.assert_close(path.start(source), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_sources_come_back_from_their_start(name):
    path, source = build(name), numbers(4, 2)
    torch.testing.assert_close(path.source_of(path.start(source)), source)


def test_starts_in_half_precision_have_the_scale_of_the_path():
    for path in (EDMPath(), build("ve")):
        scale = float(path.sigma(torch.zeros(())))
        found = path.start(torch.ones(1, 1, dtype=torch.bfloat16))
        assert found.dtype == torch.bfloat16
        assert found.item() == pytest.approx(scale, rel=2e-3)


def test_conversions_keep_the_dtype_of_the_state():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    found = build("vp").convert(x, x, torch.full((2,), 0.5), given="noise", wanted="velocity")
    assert found.dtype == torch.bfloat16


def test_edm_noise_levels_are_those_of_karras():
    path = EDMPath()
    levels = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    t = torch.arange(18, dtype=torch.float64) / 17
    torch.testing.assert_close(path.sigma(t), torch.tensor(levels, dtype=torch.float64))


def test_paced_lines_are_straight_and_power_one_is_rectified():
    path, t = PacedPath(3.0), torch.linspace(0, 1, 11)
    torch.testing.assert_close(path.alpha(t) + path.sigma(t), torch.ones(11))
    torch.testing.assert_close(PacedPath(1.0).alpha(t), t)


@pytest.mark.parametrize("name", NAMES)
def test_build_restores_what_config_tells(name):
    path = build(name)
    assert build(**path.config()) == path
    assert path.config()["name"] == name


def test_build_keeps_parameters():
    assert build(**EDMPath(sigma_max=10.0).config()) == EDMPath(sigma_max=10.0)


def test_build_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown path 'rectifed': did you mean 'rectified'"):
        build("rectifed")
    with pytest.raises(ValueError, match="path 'vp' takes a, b, got c"):
        build("vp", c=1.0)
    with pytest.raises(ValueError, match="power must be >= 1"):
        build("paced", power=0.5)
    with pytest.raises(ValueError, match="sigma_max - sigma_min must be > 0"):
        build("edm", sigma_max=0.001)


def test_unknown_predictions_are_refused():
    path, x, t = build("rectified"), torch.zeros(1, 1), torch.zeros(1)
    for names in ({"given": "epsilon", "wanted": "data"}, {"given": "data", "wanted": "epsilon"}):
        with pytest.raises(ValueError, match="unknown prediction 'epsilon'"):
            path.convert(x, x, t, **names)
    with pytest.raises(ValueError, match="unknown prediction 'w'"):
        path.target_of("w", x, x, t)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(NAMES), t=st.floats(0.02, 0.98), shift=st.floats(-3, 3))
def test_velocity_is_the_derivative_of_the_interpolation(name, t, shift):
    path, h = build(name), 1e-6
    source = torch.full((1, 2), 0.7, dtype=torch.float64)
    target = source + shift
    ends = [torch.tensor([t + sign * h], dtype=torch.float64) for sign in (1, -1)]
    after, before = (path.interpolate(source, target, end) for end in ends)
    found = path.velocity(source, target, torch.tensor([t], dtype=torch.float64))
    torch.testing.assert_close(found, (after - before) / (2 * h), rtol=1e-6, atol=1e-6)
