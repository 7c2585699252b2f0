"""FlowChef: the invariants of its specification, every path and solver, and what is refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from rectiflow.errors import SteeringDivergedError
from rectiflow.flows import FlowModel, integrate, sample
from rectiflow.flows.fields import Counted
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.flows.path_registry import PATHS
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.solvers import names
from rectiflow.guidance import FlowChef, LinearInverse, Masked
from rectiflow.images.degradations import Downscale, Identity, Mask, box_mask

IMAGE = (1, 4, 4)
MASK = Mask(box_mask(IMAGE, 2))
STEPS = 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A curved field with parameters, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 16).double()
        with torch.no_grad():
            self.map.weight.copy_(0.1 * draw(16, 16, seed=2))
            self.map.bias.copy_(draw(16, seed=3))
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return torch.tanh(self.map(x.flatten(1))).reshape(x.shape) + t[:, None, None, None]


def constant(x, t):
    """A velocity that does not depend on the state."""
    return torch.ones_like(x) * t[:, None, None, None]


def inpaint(rows: int = 3) -> LinearInverse:
    return LinearInverse(MASK, MASK.A(draw(rows, *IMAGE, seed=5).clamp(-1, 1)))


def steered(field, chef, *, x=None, steps=STEPS, solver="euler"):
    x = draw(3, *IMAGE) if x is None else x
    with torch.no_grad():
        return integrate(field, x, steps, solver, correctors=(chef,))


@pytest.mark.parametrize("path", ["rectified", "vp", "sub-vp", "cosine", "edm", "paced"])
@pytest.mark.parametrize("inner", [1, 3])
def test_skipped_and_exact_gradients_coincide_where_the_velocity_is_constant(path, inner):
    model = FlowModel(constant, PATHS[path]())
    found = [steered(model, FlowChef(inpaint(), inner=inner, skip=skip)) for skip in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[0], integrate(model, draw(3, *IMAGE), STEPS))


def test_exact_gradient_of_a_linear_field():
    """For v = M x the estimate is (I + (1 - t) M) x, whose transpose carries the gradient."""
    matrix, g = 0.3 * draw(4, 4, seed=1), draw(4, seed=2)
    model = FlowModel(lambda x, t: x @ matrix.T)
    settings = {"step_size": 0.1, "scaled": False, "clip": None}
    moved = {}
    for skip in (True, False):
        chef = FlowChef(lambda x: x @ g, skip=skip, **settings)
        x = draw(2, 4)
        moved[skip] = integrate(model, x, [0.25, 0.5], correctors=(chef,)) - integrate(
            model, x, [0.25, 0.5]
        )
    wanted = -0.1 * (torch.eye(4).double() + 0.75 * matrix).T @ g
    torch.testing.assert_close(moved[False], wanted.expand(2, 4))
    torch.testing.assert_close(moved[True], (-0.1 * g).expand(2, 4))


@pytest.mark.parametrize("settings", [{"step_size": 0.0}, {"max_steps": 0}, {"until": 0.0},
                                      {"first_step": STEPS}])  # fmt: skip
def test_no_steering_is_plain_sampling_bit_for_bit(settings):
    model = FlowModel(Net())
    assert torch.equal(
        steered(model, FlowChef(inpaint(), **settings)),
        integrate(model, draw(3, *IMAGE), STEPS).detach(),
    )


def test_cost_contracts_as_predicted():
    """With A = I and a constant velocity, a move multiplies the residual by 1 - 2 s."""
    chef = FlowChef(LinearInverse(Identity(), draw(3, *IMAGE, seed=5)), step_size=0.1, clip=None)
    steered(FlowModel(lambda x, t: torch.ones_like(x)), chef)
    found = torch.stack(chef.costs)
    assert len(found) == STEPS - 1
    torch.testing.assert_close(found[1:] / found[:-1], torch.full((6, 3), 0.64).double())


def test_scaling_makes_one_step_size_suit_every_operator():
    """Averages of four have curvature 1/4; scaled, they contract like the identity."""
    ratios = []
    for operator in (Identity(), Downscale(2)):
        y = operator.A(draw(3, *IMAGE, seed=5))
        chef = FlowChef(LinearInverse(operator, y), step_size=0.1, clip=None)
        steered(FlowModel(lambda x, t: torch.ones_like(x)), chef)
        ratios.append(chef.costs[1] / chef.costs[0])
    torch.testing.assert_close(*ratios)
    # The mean and the sum are the same problem.
    means = FlowChef(LinearInverse(MASK, inpaint().measured, "mean"))
    sums = FlowChef(inpaint())
    model = FlowModel(Net())
    torch.testing.assert_close(steered(model, means), steered(model, sums))


@pytest.mark.parametrize("solver", [name for name in names() if name != "sde"])
def test_every_solver_corrects_once_a_step(solver):
    model, chef = FlowModel(Net()), FlowChef(inpaint(), step_size=0.2)
    free = steered(model, FlowChef(inpaint(), step_size=0.0), solver=solver)
    found = steered(model, chef, solver=solver)
    assert len(chef.costs) == STEPS - 1
    assert inpaint()(found).mean() < 0.2 * inpaint()(free).mean()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["velocity", "data", "noise"])
def test_every_path_and_prediction(path, prediction):
    """On the exact field of a Gaussian, whichever way it is written down."""
    kind = PATHS[path]()

    def net(x, t):
        alpha, sigma = (f(t)[:, None, None, None] for f in (kind.alpha, kind.sigma))
        data = 0.1 + 0.5 * alpha / (0.5 * alpha**2 + sigma**2) * (x - 0.1 * alpha)
        return kind.convert(data, x, t, given="data", wanted=prediction)

    model = FlowModel(net, kind, prediction)
    start = model.path.start(draw(3, *IMAGE))
    found = steered(model, FlowChef(inpaint(), step_size=0.2), x=start, steps=30)
    free = integrate(model, start, 30)
    assert torch.isfinite(found).all()
    assert (inpaint()(found) < 0.5 * inpaint()(free)).all()


def test_samples_do_not_see_each_other():
    model = FlowModel(Net())
    x = draw(3, *IMAGE)
    together = steered(model, FlowChef(inpaint()), x=x)
    for row in range(3):
        alone = FlowChef(LinearInverse(MASK, inpaint().measured[row : row + 1]))
        found = steered(model, alone, x=x[row : row + 1])
        torch.testing.assert_close(found, together[row : row + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip, calls", [(True, STEPS), (False, 2 * STEPS - 1)])
def test_calls_of_the_network_and_no_graph(skip, calls):
    net = Net()
    found = steered(FlowModel(net), FlowChef(inpaint(), skip=skip))
    assert net.calls == calls
    assert not found.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_nothing_is_kept_for_a_backward_pass():
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        steered(FlowModel(Net()), FlowChef(inpaint()))
        assert not saved
        steered(FlowModel(Net()), FlowChef(inpaint(), skip=False))
        assert saved


def test_what_is_measured_agrees_and_the_input_is_left_alone():
    cost, x = inpaint(), draw(3, *IMAGE)
    kept = x.clone()
    found = steered(FlowModel(Net()), FlowChef(cost, step_size=0.2), x=x, steps=50)
    away = (found - cost.measured)[..., MASK.keep[0] > 0]
    # The last step is plain: what is left is how far the field bends within it.
    assert away.abs().max() < 0.05
    assert torch.equal(x, kept)


def test_adam_forgets_its_state_and_moves_by_the_step_size():
    far = LinearInverse(MASK, MASK.A(torch.full((1, *IMAGE), 10.0)))
    chef = FlowChef(far, optimizer="adam", step_size=0.01, clip=None)
    model = FlowModel(lambda x, t: torch.zeros_like(x))
    x = draw(3, *IMAGE)
    found = steered(model, chef, x=x) - x
    measured = MASK.keep[0] > 0
    # The first move of Adam is the sign of the gradient, here seven times the same.
    assert not found[..., ~measured].any()
    torch.testing.assert_close(
        found[..., measured].abs(), torch.full((3, 1, 12), 0.07).double(), rtol=1e-3, atol=0
    )


def test_adam_of_several_moves_is_that_of_torch():
    chef = FlowChef(inpaint(), optimizer="adam", step_size=0.02, clip=None, inner=4, max_steps=1)
    x = draw(3, *IMAGE)
    found = steered(FlowModel(lambda x, t: torch.zeros_like(x)), chef, x=x)
    wanted = nn.Parameter(x.clone())
    adam = torch.optim.Adam([wanted], lr=0.02)
    for _ in range(4):
        adam.zero_grad()
        inpaint()(wanted).sum().backward()
        adam.step()
    torch.testing.assert_close(found, wanted.detach())


def test_schedules():
    cost, time = Masked(torch.zeros(1, 2).double(), torch.ones(2)), 0.5
    model = FlowModel(lambda x, t: torch.zeros_like(x))
    moves = {}
    for schedule in ("constant", "linear", "noise", lambda t: t**2):
        chef = FlowChef(cost, schedule=schedule, until=0.8, clip=None)
        x = torch.ones(1, 2).double()
        moves[schedule if isinstance(schedule, str) else "own"] = float(
            integrate(model, x, [time, 0.6], correctors=(chef,))[0, 0] - 1
        )
    factors = {name: move / moves["constant"] for name, move in moves.items()}
    assert factors == pytest.approx({"constant": 1, "linear": 0.375, "noise": 0.5, "own": 0.25})


def test_steps_between_first_max_and_until():
    for settings, count in (
        ({"first_step": 2}, 5), ({"max_steps": 3}, 3), ({"until": 0.5}, 4), ({"last": True}, 8),
        ({"first_step": 2, "max_steps": 3}, 1),
    ):  # fmt: skip
        chef = FlowChef(inpaint(), **settings)
        steered(FlowModel(Net()), chef)
        assert len(chef.costs) == count, settings


def test_runs_do_not_leak_into_each_other():
    chef, model = FlowChef(inpaint()), FlowModel(Net())
    assert torch.equal(steered(model, chef), steered(model, chef))
    assert len(chef.costs) == STEPS - 1


def test_clip_bounds_each_move():
    chef = FlowChef(inpaint(), step_size=50.0, scaled=False, clip=0.1, max_steps=1)
    model = FlowModel(lambda x, t: torch.zeros_like(x))
    x = draw(3, *IMAGE)
    moved = (steered(model, chef, x=x) - x).flatten(1).norm(dim=1)
    # sqrt(16) = 4 at sigma = 1.
    torch.testing.assert_close(moved, torch.full((3,), 0.4).double())


def test_divergence_stops_with_the_numbers():
    chef = FlowChef(inpaint(), step_size=3.0, scaled=False, clip=None)
    with pytest.raises(SteeringDivergedError) as caught:
        steered(FlowModel(Net()), chef, steps=50)
    said = str(caught.value)
    assert "\n" not in said
    assert "steering diverged at step" in said
    assert "take a smaller step_size than 3" in said


def test_three_rises_warn_once_a_trajectory():
    chef = FlowChef(inpaint(), step_size=1.3, scaled=False, clip=None, growth=math.inf)
    with pytest.warns(UserWarning, match="rose three times in a row") as caught:
        steered(FlowModel(Net()), chef, steps=20)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steered(FlowModel(Net()), FlowChef(inpaint()), steps=50)


def test_curvature_is_found_once_a_trajectory():
    shapes = []

    class Seen(Masked):
        def curvature(self, shape):
            shapes.append(shape)
            return super().curvature(shape)

    chef = FlowChef(Seen(draw(1, *IMAGE), torch.ones(4, 4)))
    for count in (1, 2):
        steered(FlowModel(Net()), chef)
        assert shapes == [IMAGE] * count


def test_clip_keeps_a_step_that_is_too_long_within_the_noise():
    """The residual cannot pass a few times sqrt(D) sigma(t), at last 4 · 3 / 50."""
    chef = FlowChef(inpaint(), step_size=3.0, scaled=False, clip=1.0)
    steered(FlowModel(constant), chef, steps=50)
    assert (chef.costs[-1].sqrt() < 4 * 3 / 50).all()


def test_scaled_steps_that_must_diverge_are_refused():
    with pytest.raises(ValueError, match=r"step_size must be below 1 where .* got 1\.5"):
        steered(FlowModel(Net()), FlowChef(inpaint(), step_size=1.5))


def test_a_cost_that_is_not_a_number_stops():
    chef = FlowChef(lambda x: x.flatten(1).sum(1) * torch.nan)
    with pytest.raises(SteeringDivergedError, match=r"step 0 .* to nan"):
        steered(FlowModel(Net()), chef)


def test_guided_fields_are_steered_with_one_call_a_step():
    class Conditional(nn.Module):
        def forward(self, x, t, *, label):
            return 0.1 * x + label[:, None, None, None]

        def null_condition(self, *, label):
            return {"label": torch.zeros_like(label)}

    guided = ClassifierFreeGuidance(FlowModel(Conditional()), 2.0)
    field = Counted(guided)
    chef = FlowChef(inpaint(), path=RectifiedPath(), step_size=0.2)
    found = integrate(
        field, draw(3, *IMAGE), STEPS, correctors=(chef,), label=torch.tensor([0, 1, 2])
    )
    assert field.evaluations == STEPS
    assert (inpaint()(found) < 1).all()


def test_single_precision_and_inference_mode():
    model = FlowModel(lambda x, t: torch.tanh(x))
    x = torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(0))
    for skip in (True, False):
        with torch.inference_mode():
            found = integrate(model, x, 5, correctors=(FlowChef(inpaint(), skip=skip),))
        assert found.dtype == torch.float32


def test_sample_takes_one_measurement_for_any_batch():
    model = FlowModel(Net(), shape=IMAGE)
    chef = FlowChef(inpaint(1), step_size=0.2)
    found = sample(model, source=draw(5, *IMAGE), steps=STEPS, correctors=(chef,), batch_size=2)
    assert (inpaint(1)(found) < 1).all()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"step_size": -1.0}, "step_size must be finite and >= 0, got -1"),
        ({"step_size": math.nan}, "step_size must be finite and >= 0, got nan"),
        ({"step_size": math.inf}, "step_size must be finite"),
        ({"inner": 0}, "inner must be > 0"),
        ({"optimizer": "adamw"}, "did you mean 'adam'"),
        ({"schedule": "linea"}, "did you mean 'linear'"),
        ({"until": 1.5}, r"until must be in \[0, 1\]"),
        ({"max_steps": -1}, "max_steps must be >= 0"),
        ({"clip": 0.0}, "clip must be > 0"),
        ({"growth": math.nan}, "growth must be > 0"),
        ({"skip": False, "velocity": lambda step: step.velocity}, "no effect with skip=False"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        FlowChef(inpaint(), **settings)


def test_bad_use():
    with pytest.raises(ValueError, match="give rising times"):
        steered(FlowModel(Net()), FlowChef(inpaint()), steps=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="needs the path"):
        steered(constant, FlowChef(inpaint()))
    with pytest.raises(ValueError, match="the mask is 4x4 but the image is 8x8"):
        steered(FlowModel(constant), FlowChef(inpaint()), x=draw(3, 1, 8, 8))
