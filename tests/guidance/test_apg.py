"""Adaptive projected guidance: against a loop by hand and diffusers, limits, memory, invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rectiflow.align.chain import sample_with_gradient
from rectiflow.distill.generation import describe_field
from rectiflow.flows import Field, FlowModel, RectifiedPath, integrate
from rectiflow.flows.compiled import CompiledSampler
from rectiflow.flows.guided import begun
from rectiflow.flows.path_registry import PATHS, build
from rectiflow.guidance import (
    APG,
    ClassifierFreeGuidance,
    FlowChef,
    preset,
    projected_guidance,
    rectify,
)
from rectiflow.guidance.presets import PRESETS
from rectiflow.vectors import inner, norm

G = torch.Generator().manual_seed(0)
SHAPE = (3, 2, 4, 4)
X = torch.randn(SHAPE, generator=G, dtype=torch.float64)
T = torch.full((3,), 0.4, dtype=torch.float64)
LABEL = torch.tensor([0, 1, 2])
TURNS = torch.randn(8, *SHAPE[1:], generator=G, dtype=torch.float64)
FULL = {"eta": 0.3, "norm": 2.0, "momentum": -0.5}


class Net(torch.nn.Module):
    """A smooth answer of its own for every label, in float64 as the states are."""

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        turn = TURNS[label].to(x.dtype)
        said = torch.tanh(x * turn) + turn * (1 + t.view(-1, 1, 1, 1))
        return said.to(x.dtype)

    def null_condition(self, *, label: Tensor) -> dict[str, Tensor]:
        return {"label": torch.full_like(label, 7)}


def model(path: str = "rectified", prediction: str = "velocity") -> FlowModel:
    return FlowModel(Net(), build(path), prediction)


def pair(seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SHAPE, generator=generator).to(dtype) for _ in "cu")  # type: ignore


def by_hand(c: Tensor, u: Tensor, scale: float, before: Tensor | float, **s) -> tuple:
    """Algorithm 1 of the paper, a sample at a time."""
    guided, averages = [], []
    for i, (dc, du) in enumerate(zip(c.double(), u.double())):
        m = dc - du + s["momentum"] * (before[i] if isinstance(before, Tensor) else before)
        averages.append(m)
        d = m * min(1.0, s["norm"] / float((m * m).sum().sqrt()))
        e = dc / float((dc * dc).sum().sqrt())
        along = float((d * e).sum()) * e
        guided.append(dc + (scale - 1) * (d - along + s["eta"] * along))
    return torch.stack(guided), torch.stack(averages)


# oracle


def test_the_pure_function_is_algorithm_one_over_several_calls() -> None:
    average, before = None, 0.0
    for seed in range(4):
        c, u = pair(seed, torch.float64)
        found = projected_guidance(c, u, 7.5, average=average, **FULL)
        wanted, before = by_hand(c, u, 7.5, before, **FULL)
        torch.testing.assert_close(found.data, wanted)
        torch.testing.assert_close(found.average, before)
        average = found.average


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_a_trajectory_is_the_loop_by_hand_in_data_space(path: str, prediction: str) -> None:
    """Invariant 7: the velocity is that of the guided data, on every path and prediction."""
    field, times = model(path, prediction), [0.3, 0.4, 0.6, 0.7]
    x, before = X, 0.0
    for now, then in pairwise(times):
        t = torch.full((3,), now, dtype=torch.float64)
        c = field.denoise(x, t, label=LABEL)
        u = field.denoise(x, t, **field.null_condition(label=LABEL))
        data, before = by_hand(c, u, 4.0, before, **FULL)
        x = x + (then - now) * field.path.convert(data, x, t, given="data", wanted="velocity")
    found = integrate(APG(field, 4.0, **FULL), X, times, label=LABEL)
    # Times pass from float64 to float64; conversions lose a few digits where alpha is small.
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_views_agree(path: str) -> None:
    field = APG(model(path), 4.0, eta=0.2, norm=2.0, momentum=0.0)
    assert isinstance(field, Field)
    velocity = field.velocity(X, T, label=LABEL)
    for wanted, view in (("data", field.denoise), ("noise", field.noise)):
        expected = field.path.convert(velocity, X, T, given="velocity", wanted=wanted)
        torch.testing.assert_close(view(X, T, label=LABEL), expected, rtol=1e-7, atol=1e-7)


def test_projecting_velocities_is_something_else() -> None:
    field = model()
    c, u = (field.velocity(X, T, label=one) for one in (LABEL, torch.full_like(LABEL, 7)))
    naive = c + 3 * rectify(c - u, c)
    found = APG(field, 4.0, momentum=0.0).velocity(X, T, label=LABEL)
    assert (found - naive).abs().max() > 0.1


def test_parity_with_diffusers_over_a_trajectory() -> None:
    """Invariant 5. Their original formulation calls the scale what we call scale - 1."""
    import diffusers.guiders.adaptive_projected_guidance as guiders

    for eta, bound, beta in ((0.0, 2.0, -0.5), (0.4, 2.0, -0.75), (1.0, 5.0, -0.5), (0.0, 0, 0)):
        buffer = guiders.MomentumBuffer(beta)
        guider = guiders.AdaptiveProjectedGuidance(
            guidance_scale=6.5,
            adaptive_projected_guidance_rescale=float(bound),
            eta=eta,
            use_original_formulation=True,
        )
        guider.momentum_buffer = buffer
        average = None
        for step in range(3):
            c, u = pair(step)
            ours = projected_guidance(
                c, u, 7.5, eta=eta, norm=bound or None, momentum=beta, average=average
            )
            average = ours.average
            theirs = guider.forward(c, u).pred
            torch.testing.assert_close(ours.data, theirs, rtol=1e-5, atol=1e-5)


def test_parity_with_diffusers_per_channel() -> None:
    import diffusers.guiders.adaptive_projected_guidance as guiders

    c, u = pair()
    theirs = guiders.normalized_guidance(c, u, 3.0, None, 0.2, 1.0, True, (2, 3))
    ours = projected_guidance(c, u, 4.0, eta=0.2, norm=1.0, per_channel=True).data
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_default_of_diffusers_has_one_parallel_part_less() -> None:
    """Not a bug of either: their default starts from the null answer, the paper's from the other.

    Without the projection (eta = 1, their default) both are classifier-free guidance.
    """
    import diffusers.guiders.adaptive_projected_guidance as guiders

    c, u = pair()
    along = (c - u) - rectify(c - u, c)
    for eta in (0.0, 0.5, 1.0):
        theirs = guiders.normalized_guidance(c, u, 4.0, None, eta, 0.0, False)
        ours = projected_guidance(c, u, 4.0, eta=eta).data
        torch.testing.assert_close(theirs, ours - (1 - eta) * along, rtol=1e-4, atol=1e-4)


# limit


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_without_its_parts_it_is_classifier_free_guidance(path: str, prediction: str) -> None:
    """Invariant 1, bit for bit; and close to it where the general way is taken."""
    inside, off = model(path, prediction), {"eta": 1.0, "momentum": 0.0}
    for view in ("velocity", "denoise", "noise"):
        wanted = getattr(ClassifierFreeGuidance(inside, 7.5), view)(X, T, label=LABEL)
        found = getattr(APG(inside, 7.5, **off), view)(X, T, label=LABEL)
        assert torch.equal(found, wanted)
        general = getattr(APG(inside, 7.5, norm=1e9, **off), view)(X, T, label=LABEL)
        torch.testing.assert_close(general, wanted, rtol=1e-6, atol=1e-6)


def test_scale_one_is_the_conditional_field_bit_for_bit() -> None:
    """Invariant 2, also where both answers agree or are zero."""
    field = model()
    for view in ("velocity", "denoise", "noise"):
        plain = getattr(field, view)(X, T, label=LABEL)
        assert torch.equal(getattr(APG(field, 1.0, **FULL), view)(X, T, label=LABEL), plain)
    c, u = pair()
    zero = torch.zeros_like(c)
    assert torch.equal(projected_guidance(c, u, 1.0, **FULL).data, c)
    assert torch.equal(projected_guidance(c, c, 5.0, **FULL).data, c)
    assert torch.equal(projected_guidance(zero, zero, 5.0, **FULL).data, zero)
    assert projected_guidance(zero, u, 5.0, **FULL).data.isfinite().all()


def test_outside_the_interval_it_is_the_conditional_field() -> None:
    field, apg = model(), APG(model(), 4.0, start=0.2, stop=0.5, **FULL)
    t = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    found, plain = (f.velocity(X, t, label=LABEL) for f in (apg, field))
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    whole = replace(apg, start=0.0, stop=1.0).velocity(X, t, label=LABEL)
    torch.testing.assert_close(found[1], whole[1])
    assert (found[1] - plain[1]).abs().max() > 0.1


def test_momentum_starts_with_the_interval() -> None:
    """Steps before it leave nothing behind, on hosts that look and devices that do not."""
    apg = APG(model(), 4.0, start=0.35, **FULL)
    early = torch.full((3,), 0.2, dtype=torch.float64)
    rows = torch.tensor([0.2, 0.2, 0.4], dtype=torch.float64)
    first = begun(apg).velocity(X, T, label=LABEL)
    for times in (early, rows):
        field = begun(apg)
        field.velocity(X, times, label=LABEL)
        found = field.velocity(X, T, label=LABEL)
        torch.testing.assert_close(found[:2], first[:2])


def test_the_data_end_is_finite_and_continuous_without_momentum() -> None:
    """At sigma = 0 the direction is projected as it is: the limit from before."""
    for momentum in (0.0, -0.5):
        field = begun(APG(model(), 4.0, norm=2.0, momentum=momentum))
        for now in (0.9, 1.0):
            t = torch.full((3,), now, dtype=torch.float64)
            found = field.velocity(X, t, label=LABEL)
            assert found.isfinite().all()
            assert found.abs().max() < 1e3
    field = APG(model(), 4.0, norm=2.0, momentum=0.0)
    at, near = (
        field.velocity(X, torch.full((3,), s, dtype=torch.float64), label=LABEL)
        for s in (1.0, 1 - 1e-4)
    )
    torch.testing.assert_close(at, near, rtol=1e-2, atol=1e-2)


# property


def test_without_the_parallel_part_the_step_is_orthogonal() -> None:
    """Invariant 3."""
    c, u = pair()
    step = projected_guidance(c, u, 7.5, norm=2.0).data - c
    share = inner(step, c).abs() / (norm(step) * norm(c))
    assert share.max() < 1e-5


def test_the_norm_bounds_the_step() -> None:
    """Invariant 4, with momentum; as a root mean square for every size."""
    c, u = pair()
    for eta in (0.0, 0.5, 1.0):
        made = projected_guidance(c, u, 7.5, eta=eta, norm=0.7, momentum=-0.5, average=u)
        assert (norm(made.data - c) <= 6.5 * 0.7 * (1 + 1e-5)).all()
    size = math.sqrt(X[0].numel())
    asked = {"momentum": 0.0, "eta": 0.0}
    a = APG(model(), 4.0, norm=0.1 * size, **asked).denoise(X, T, label=LABEL)
    b = APG(model(), 4.0, norm=0.1, rms=True, **asked).denoise(X, T, label=LABEL)
    torch.testing.assert_close(a, b)


def test_it_scales_with_the_data() -> None:
    """Invariant 6."""
    c, u = pair()
    one = projected_guidance(c, u, 4.0, eta=0.3, norm=2.0).data
    ten = projected_guidance(10 * c, 10 * u, 4.0, eta=0.3, norm=20.0).data
    torch.testing.assert_close(ten, 10 * one, rtol=1e-5, atol=1e-5)


def test_momentum_of_a_constant_difference_tends_to_two_thirds() -> None:
    """Invariant 8."""
    c, u = pair()
    average = None
    for _ in range(30):
        average = projected_guidance(c, u, 4.0, momentum=-0.5, average=average).average
    torch.testing.assert_close(average, (c - u) / 1.5)


def test_samples_do_not_touch_each_other() -> None:
    """Invariant 9, through a whole trajectory."""
    field, order = APG(model(), 4.0, **FULL), torch.tensor([2, 0, 1])
    whole = integrate(field, X, 4, "heun", label=LABEL)
    turned = integrate(field, X[order], 4, "heun", label=LABEL[order])
    torch.testing.assert_close(turned, whole[order])
    other = torch.cat([X[:1], 100 * X[1:]])
    alone = integrate(field, other, 4, "heun", label=LABEL)
    torch.testing.assert_close(alone[0], whole[0])


def test_every_trajectory_begins_anew_and_nothing_is_written() -> None:
    """Invariant 10, without a reset to forget."""
    field, before = APG(model(), 4.0, **FULL), X.clone()
    ends = [integrate(field, X, [0.5, 0.7, 0.9], label=LABEL) for _ in range(2)]
    assert torch.equal(*ends)
    assert torch.equal(X, before)
    assert torch.equal(field.velocity(X, T, label=LABEL), field.velocity(X, T, label=LABEL))
    inner_ = ClassifierFreeGuidance(field, 1.0)
    assert torch.equal(integrate(inner_, X, [0.5, 0.7, 0.9], label=LABEL), ends[0])


class Looks:
    """A field in data space with a constant difference, which notes the momentum it meets."""

    path = RectifiedPath()

    def velocity(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        data = torch.ones_like(x) * (label == 0)[:, None] + torch.tensor([0.0, 1.0])
        return (data - x) / (1 - t[:, None])

    denoise = noise = velocity

    def null_condition(self, *, label: Tensor) -> dict[str, Tensor]:
        return {"label": torch.ones_like(label)}


@pytest.mark.parametrize(
    "solver, updates",
    # Two steps of 0.25: the number of different times looked at.
    [("euler", 2), ("first-order", 2), ("midpoint", 4), ("heun", 3), ("rk4", 5)],
)
def test_solvers_with_stages_update_once_a_time(solver: str, updates: int) -> None:
    field = begun(APG(Looks(), 3.0, momentum=-0.5))  # type: ignore[arg-type]
    x, label = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    integrate(lambda x, t: field.velocity(x, t, label=label), x, [0.0, 0.25, 0.5], _named(solver))
    wanted = sum((-0.5) ** i for i in range(updates))
    # The difference of the data is (1, 1) at every time and state.
    torch.testing.assert_close(field._memory.average, torch.full((1, 2), wanted))


def _named(solver: str):
    from rectiflow.flows.first_order import FirstOrder

    return FirstOrder(RectifiedPath()) if solver == "first-order" else solver


def test_guidance_around_momentum_keeps_its_rows_outside_its_interval() -> None:
    """Each branch has a momentum of its own from the first step on."""
    field = APG(model(), 3.0, eta=0.3)
    times = [0.1, 0.3, 0.5, 0.7]
    found = integrate(ClassifierFreeGuidance(field, 2.0, start=0.4), X, times, label=LABEL)
    x, inner = X, begun(field)
    null = field.null_condition(label=LABEL)["label"]
    for now, after in pairwise(times):
        t = torch.full((len(X),), now, dtype=X.dtype)
        both = torch.cat([x, x]), torch.cat([t, t])
        one, other = inner.velocity(*both, label=torch.cat([LABEL, null])).chunk(2)
        x = x + (after - now) * (torch.lerp(other, one, 2.0) if now >= 0.4 else one)
    torch.testing.assert_close(found, x)


def test_momentum_runs_backward_too() -> None:
    field = begun(APG(Looks(), 3.0, momentum=-0.5))  # type: ignore[arg-type]
    x, label = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for now in (0.75, 0.5, 0.25):
        field.velocity(x, torch.tensor([now]), label=label)
    torch.testing.assert_close(field._memory.average, torch.full((1, 2), 0.75))


def test_half_precision_is_computed_in_single() -> None:
    c, u = pair()
    wide = projected_guidance(c.bfloat16().float(), u.bfloat16().float(), 7.5, norm=2.0).data
    half = projected_guidance(c.bfloat16(), u.bfloat16(), 7.5, norm=2.0).data
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, wide.bfloat16())
    field = APG(model(), 4.0, **FULL)
    assert integrate(field, X.half(), 3, label=LABEL).dtype == torch.float16


# order


def test_without_momentum_solvers_keep_their_order() -> None:
    """The guided field is a smooth function of state and time, so Heun's error falls as 1/4."""
    field = APG(model(), 2.0, eta=0.5, momentum=0.0)
    best = integrate(field, X, torch.linspace(0, 0.9, 257).tolist(), "rk4", label=LABEL)
    errors = []
    for steps in (16, 32):
        found = integrate(field, X, torch.linspace(0, 0.9, steps + 1).tolist(), "heun", label=LABEL)
        errors.append(float((found - best).norm()))
    assert 3 < errors[0] / errors[1] < 5.5


# gradient


def test_gradients_are_right_and_finite_at_zero() -> None:
    c, u = (one[:1, :, :2, :2].clone().requires_grad_() for one in pair(dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda c, u: projected_guidance(c, u, 4.0, eta=0.2, norm=1.0).data, (c, u)
    )
    zero = torch.zeros(1, 2, 2, 2, requires_grad=True)
    projected_guidance(zero, zero, 4.0, norm=1.0).data.sum().backward()
    assert zero.grad.isfinite().all()


def test_gradients_flow_through_the_momentum() -> None:
    x = X.clone().requires_grad_()
    integrate(APG(model(), 4.0, **FULL), x, 3, label=LABEL).square().mean().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).all()


# life


def test_compiled_steps_equal_integrated_ones() -> None:
    field = APG(model(), 4.0, eta=0.2, norm=2.0, momentum=0.0)
    compiled = torch.compile(
        lambda x, t: field.velocity(x, t, label=LABEL), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(X, T), field.velocity(X, T, label=LABEL))


def test_records_name_all_that_matters() -> None:
    field = APG(model(), 7.5, norm=15.0, stop=0.8, negative={"label": 3})
    assert describe_field(field) == "APG(scale=7.5, negative={label:3}, stop=0.8, norm=15.0)"
    assert describe_field(begun(field)) == describe_field(field)
    assert describe_field(APG(ClassifierFreeGuidance(model(), 2.0), 4.0)) == (
        "APG(scale=4.0, field=ClassifierFree(scale=2.0))"
    )


@pytest.mark.parametrize("family", sorted(PRESETS))
def test_presets_make_a_field(family: str) -> None:
    field = APG(model(), **preset(family))
    assert (field.eta, field.scale) == (0.0, PRESETS[family]["scale"])
    assert -1 < field.momentum < 0
    assert field.norm is not None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scale": -1.0}, "scale must be >= 0, got -1.0"),
        ({"scale": math.nan}, "scale must be >= 0, got nan"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"eta": math.nan}, r"eta must be in \[0, 1\], got nan"),
        ({"momentum": -1.0}, r"momentum must be in \(-1, 1\), got -1.0"),
        ({"momentum": math.nan}, r"momentum must be in \(-1, 1\), got nan"),
        ({"norm": 0.0}, "norm must be > 0, got 0.0"),
        ({"norm": math.nan}, "norm must be > 0, got nan"),
        ({"norm": math.inf}, "norm must be finite"),
        ({"rms": True}, "there is no norm"),
        ({"start": 0.5, "stop": 0.5}, "start < stop"),
        ({"stop": math.nan}, "start < stop"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APG(model(), **{"scale": 4.0, **settings})


def test_momentum_and_solvers_that_cannot_have_it() -> None:
    field = APG(model(), 4.0)
    with pytest.raises(ValueError, match="dopri5 takes evaluations back"):
        integrate(ClassifierFreeGuidance(field, 1.0), X, 2, "dopri5", label=LABEL)
    with pytest.raises(ValueError, match="share no memory"):
        CompiledSampler(field)
    with pytest.raises(ValueError, match="again going backward, so a field that remembers"):
        sample_with_gradient(field, X, 2, label=LABEL)
    with pytest.raises(ValueError, match="two calls at one time, so a field that remembers"):
        integrate(ClassifierFreeGuidance(field, 2.0, batched=False), X, 2, label=LABEL)
    exact = FlowChef(lambda x: x.square().sum(1), skip=False)
    with pytest.raises(ValueError, match="again after it, so a field that remembers"):
        integrate(field, X, 2, "heun", correctors=(exact,), label=LABEL)
    with pytest.raises(ValueError, match="unknown preset of guidance 'sdx': did you mean 'sdxl'"):
        preset("sdx")
