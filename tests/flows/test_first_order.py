"""The first-order step: the theorem, its equals, its order, its border."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.flows import FirstOrder, FlowModel, GaussianField, integrate, uniform_times
from rectiflow.flows.diffusion_paths import CosinePath
from rectiflow.flows.first_order import ends_through, first_order_jump
from rectiflow.flows.pair_format import describe_solver, solver_of
from rectiflow.flows.path_registry import PATHS, build
from rectiflow.flows.paths import PREDICTIONS, RectifiedPath
from rectiflow.flows.schedules import SchedulePath
from rectiflow.flows.solvers import resolve

SD = SchedulePath("scaled_linear", 0.00085, 0.012)
ALL = {**{name: build(name) for name in PATHS}, "schedule": SD}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def times(value, count=5):
    return torch.full((count,), value, dtype=torch.float64)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "edm", "rectified", "cosine", "schedule"])
def test_invariant_1_constant_noise_makes_one_step_exact(name):
    path, noise = ALL[name], random(5, 3)
    # Where alpha is 0 a noise alone does not fix the data: start a little later there.
    first = 0.0 if path.alpha(torch.zeros(())) > 0 else 0.05
    x = random(5, 3, seed=1)

    def end(net, steps):
        field = FlowModel(net, path, "noise")
        return integrate(field, x, uniform_times(steps, start=first), "first-order")

    one, seven = (end(lambda x, t: noise, steps) for steps in (1, 7))
    # The largest z = x / alpha is 150 here (1e-14 of it, and rounding of seven steps).
    torch.testing.assert_close(one, seven, rtol=1e-10, atol=1e-10)
    one, seven = (end(lambda x, t: noise * (1 + t[:, None]), steps) for steps in (1, 7))
    assert (one - seven).abs().max() > 1e-2


@pytest.mark.parametrize("name", sorted(ALL))
def test_invariant_2_is_euler_where_the_path_is_straight(name):
    path, x, v = ALL[name], random(5, 3), random(5, 3, seed=1)
    t, s = times(0.3), times(0.7)
    noise = path.convert(v, x, t, given="velocity", wanted="noise")
    level = [(path.sigma(time) / path.alpha(time))[:, None] for time in (t, s)]
    z = x / path.alpha(t)[:, None] + (level[1] - level[0]) * noise
    found = first_order_jump(path, v, x, t, s)
    torch.testing.assert_close(found, path.alpha(s)[:, None] * z, rtol=1e-9, atol=1e-9)


def test_invariant_2_is_euler_on_straight_lines():
    field, x = GaussianField(random(3), random(3, seed=1).exp()), random(7, 3, seed=2)
    for grid in (uniform_times(5), uniform_times(5, start=1, stop=0)):
        found, euler = (integrate(field, x, grid, solver) for solver in ("first-order", "euler"))
        torch.testing.assert_close(found, euler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind, prediction", [("epsilon", "noise"), ("v_prediction", "v")])
@pytest.mark.parametrize("steps", [4, 5])
def test_a_sampling_run_equals_diffusers_ddim(kind, prediction, steps):
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type=kind,
    )
    scheduler.set_timesteps(steps)
    path = SchedulePath.from_scheduler(scheduler.config)

    def net(x, index):
        return torch.sin(x) * (1 + index / 500)

    x = random(5, 3)
    wanted = x
    for index in scheduler.timesteps:
        wanted = scheduler.step(net(wanted, index), index, wanted).prev_sample
    model = FlowModel(lambda x, t: net(x, path.index(t)[:, None]), path, prediction)
    grid = path.trailing(steps, clean=False)
    found = integrate(model, path.start(x), grid, "first-order")
    # diffusers divides float32 roots of its table, which are 15 times smaller at the noisy end.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", PREDICTIONS)
@pytest.mark.parametrize("name", sorted(ALL))
def test_jumps_from_any_prediction_stay_on_the_pair(name, given):
    path, source, target = ALL[name], random(6, 3), random(6, 3, seed=1)
    t = torch.linspace(0.1, 0.8, 6, dtype=torch.float64)
    s = t.flip(0)  # rows go forward and backward
    output = path.target_of(given, source, target, t)
    x = path.interpolate(source, target, t)
    found = first_order_jump(path, output, x, t, s, given=given)
    torch.testing.assert_close(found, path.interpolate(source, target, s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("first, last", [(0.0, 1.0), (0.25, 0.5), (0.75, 1.0), (1.0, 0.5)])
def test_two_states_give_back_their_pair(name, first, last):
    path, source, target = ALL[name], random(5, 3), random(5, 3, seed=1)
    t, s = times(first), times(last)
    x, y = (path.interpolate(source, target, time) for time in (t, s))
    found = ends_through(path, x, t, y, s)
    for end, wanted in zip(found, (source, target)):
        torch.testing.assert_close(end, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vp", "edm", "cosine", "schedule"])
def test_error_falls_with_the_first_order(name):
    field = GaussianField(torch.tensor([0.7]).double(), torch.tensor([2.5]).double(), ALL[name])
    z = random(16, 1)
    start, stop = 0.1, 0.9
    exact = field.transport(z, start, stop)
    grids = [uniform_times(n, start=start, stop=stop) for n in (100, 200)]
    errors = [float((integrate(field, z, g, "first-order") - exact).abs().max()) for g in grids]
    assert resolve("first-order").order == 1
    # The next term moves the slope by O(1/steps).
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def test_forward_then_backward_returns():
    path = CosinePath()
    field = GaussianField(random(3), random(3, seed=1).exp(), path)
    x = random(5, 3, seed=2)
    there = integrate(field, x, 400, "first-order")
    back = integrate(field, there, uniform_times(400, start=1, stop=0), "first-order")
    # Twice the first-order error of 400 steps.
    assert (back - x).abs().max() < 0.05
    assert (there - x).abs().max() > 0.5


def test_states_keep_their_dtype_and_end_inside_the_path():
    path = build("vp")
    for dtype in (torch.bfloat16, torch.float32):
        field = FlowModel(lambda x, t: x, path, "noise")
        # Nine steps add up to 1 with a rounding error, beyond which sigma is not a number.
        found = integrate(field, torch.ones(2, 3, dtype=dtype), 9, "first-order")
        assert found.dtype == dtype
        assert found.isfinite().all()


def test_gradients_flow_through_every_step():
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def end(x, w):
        field = FlowModel(lambda x, t: torch.sin(w * x) + t[:, None], CosinePath())
        return integrate(field, x, 3, "first-order")

    assert torch.autograd.gradcheck(end, (random(2, 2).requires_grad_(), weight))


def test_solver_needs_a_path_and_takes_a_given_one():
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="first-order solver needs the field's path"):
        integrate(lambda x, t: x, x, 2, "first-order")
    given = integrate(lambda x, t: x, x, 2, FirstOrder(RectifiedPath()))
    torch.testing.assert_close(given, integrate(lambda x, t: x, x, 2))


def test_pair_stores_remember_it_by_name():
    assert describe_solver("first-order") == {"name": "first-order"}
    assert solver_of({"name": "first-order"}) == FirstOrder()
