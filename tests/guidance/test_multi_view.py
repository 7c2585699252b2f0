"""Fields of several views: limits, equivariance, conversion, batches, memory, and refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.flows import ClassifierFreeGuidance, Field, FlowModel, integrate, sample
from rectiflow.flows.compiled import CompiledSampler
from rectiflow.flows.path_registry import PATHS, build
from rectiflow.guidance import APG, Balance, MultiViewField, rectified
from rectiflow.guidance.views import Flip, Identity, Negate, Part, Rest, Rotate, View

SHAPE = (3, 1, 4, 4)
G = torch.Generator().manual_seed(0)
X = torch.randn(SHAPE, generator=G, dtype=torch.float64)
TURNS = torch.randn(8, *SHAPE[1:], generator=G, dtype=torch.float64)
T = torch.full((3,), 0.4, dtype=torch.float64)
VIEWS = [(Identity(), {"label": 1}), (Rotate(90), {"label": torch.tensor([2, 3, 4])})]
TIMES = [0.2, 0.5, 0.8]


class Net(torch.nn.Module):
    """A smooth answer of its own for every label; counts its rows."""

    rows = calls = 0

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        turn = TURNS[label].to(x.dtype)
        return (torch.tanh(x * turn) + turn * (1 + t.view(-1, 1, 1, 1))).to(x.dtype)

    def null_condition(self, *, label: Tensor) -> dict[str, Tensor]:
        return {"label": torch.full_like(label, 7)}


def model(path: str = "rectified", prediction: str = "velocity") -> FlowModel:
    return FlowModel(Net(), build(path), prediction)


def brightness(picture: Tensor, label: Tensor) -> Tensor:
    return 0.5 + 0.3 * torch.tanh(picture.flatten(1).mean(1) + label)


BALANCE = Balance(brightness)


def alone(label: Any) -> dict[str, Tensor]:
    return {"label": torch.full((3,), label) if isinstance(label, int) else label}


# oracle


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_the_mean_of_views_is_the_loop_by_hand(path: str, prediction: str) -> None:
    """Invariants 8 and 10: sample by sample, whatever is predicted and whatever is asked."""
    inner = model(path, prediction)
    field = MultiViewField(inner, VIEWS)
    assert isinstance(field, Field)
    for member in ("velocity", "denoise", "noise"):
        found = getattr(field, member)(X, T)
        for row in range(3):
            x, t = X[row : row + 1], T[:1]
            parts = []
            for view, given in VIEWS:
                label = torch.as_tensor(given["label"]).expand(3)[row : row + 1]
                parts.append(view.inverse(getattr(inner, member)(view.apply(x), t, label=label)))
            torch.testing.assert_close(found[row : row + 1], sum(parts) / 2)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_means_commute_with_conversion(path: str) -> None:
    """Invariant 8."""
    for prediction in ("velocity", "noise", "data"):
        field = MultiViewField(model(path, prediction), VIEWS)
        velocity = field.velocity(X, T)
        for member, wanted in (("denoise", "data"), ("noise", "noise")):
            expected = field.path.convert(velocity, X, T, given="velocity", wanted=wanted)
            torch.testing.assert_close(getattr(field, member)(X, T), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["official", "matched"])
@pytest.mark.parametrize("path", sorted(PATHS))
def test_rectification_acts_on_noises(path: str, kind: str) -> None:
    inner = model(path)
    field = MultiViewField(inner, VIEWS, rectify=kind)
    noises = torch.stack(
        [v.inverse(inner.noise(v.apply(X), T, **c)) for (v, _), c in zip(VIEWS, views_of(field))]
    )
    wanted = rectified(noises, None, kind)
    # Back from the velocity the noise loses digits where the path has few data.
    torch.testing.assert_close(field.noise(X, T), wanted, rtol=1e-6, atol=1e-6)
    velocity = field.path.convert(wanted, X, T, given="noise", wanted="velocity")
    torch.testing.assert_close(field.velocity(X, T), velocity, rtol=1e-6, atol=1e-6)
    data = field.path.convert(wanted, X, T, given="noise", wanted="data")
    torch.testing.assert_close(field.denoise(X, T), data, rtol=1e-6, atol=1e-6)


def views_of(field: MultiViewField) -> list[dict[str, Any]]:
    return field.conditions(X, {})


def test_balanced_views_are_weighted_by_what_the_mean_of_them_shows() -> None:
    inner = model()
    field = MultiViewField(inner, VIEWS, combine="balanced", balance=BALANCE)
    parts = [
        v.inverse(inner.velocity(v.apply(X), T, **c)) for (v, _), c in zip(VIEWS, views_of(field))
    ]
    data = inner.path.convert(sum(parts) / 2, X, T, given="velocity", wanted="data")
    scores = [brightness(v.apply(data), **c) for (v, _), c in zip(VIEWS, views_of(field))]
    # The share of the steps that is done is the time.
    powers = torch.stack([s**-1.4 for s in scores])
    weights = (powers / powers.sum(0)).view(2, 3, 1, 1, 1)
    torch.testing.assert_close(field.velocity(X, T), weights[0] * parts[0] + weights[1] * parts[1])


def test_balance_counts_steps_where_they_are_known() -> None:
    grid = [0.0, 0.4, 0.5, 0.6, 1.0]
    uneven = MultiViewField(model(), VIEWS, combine="balanced", balance=BALANCE, steps=grid)
    even = MultiViewField(model(), VIEWS, combine="balanced", balance=BALANCE)
    counted = uneven.velocity(X, torch.full_like(T, 0.6))
    assert not torch.allclose(counted, even.velocity(X, torch.full_like(T, 0.6)))
    assert uneven._share(torch.tensor([0.0, 0.4, 0.45, 0.6, 1.0])).tolist() == [
        0,
        1 / 4,
        1 / 4,
        3 / 4,
        3 / 4,
    ]
    for count in (7, 30, 1000):
        starts = torch.arange(count) / count
        share = MultiViewField(model(), VIEWS, steps=count)._share(starts)
        torch.testing.assert_close(share, starts)


def test_scores_of_states_see_views_of_the_state_and_the_time() -> None:
    seen: list[Tensor] = []

    def score(state: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(state)
        return torch.full_like(t, 0.5)

    field = MultiViewField(model(), VIEWS, combine="balanced", balance=Balance(score, "state"))
    plain = MultiViewField(model(), VIEWS)
    torch.testing.assert_close(field.velocity(X, T), plain.velocity(X, T))
    assert torch.equal(seen[0], X)
    assert torch.equal(seen[1], Rotate(90).apply(X))


def test_alternation_is_one_view_a_step() -> None:
    inner = model()
    field = MultiViewField(inner, VIEWS, combine="alternate", steps=4)
    x, given = X, views_of(field)
    for step in range(4):
        view, condition = VIEWS[step % 2][0], given[step % 2]
        t = torch.full_like(T, step / 4)
        x = x + 0.25 * view.inverse(inner.velocity(view.apply(x), t, **condition))
    before = inner.net.calls, inner.net.rows
    torch.testing.assert_close(integrate(field, X, 4), x)
    assert (inner.net.calls - before[0], inner.net.rows - before[1]) == (4, 12)


def test_alternation_backward_begins_with_the_first_view() -> None:
    inner, times = model(), [0.9, 0.6, 0.2, 0.1]
    field = MultiViewField(inner, VIEWS, combine="alternate", steps=times)
    for solver, looks in (("euler", (0.0,)), ("midpoint", (0.0, 0.5))):
        x, given = X, views_of(field)
        for step, (now, after) in enumerate(pairwise(times)):
            view, condition = VIEWS[step % 2][0], given[step % 2]
            state = x
            for look in looks:
                t = torch.full_like(T, now + look * (after - now))
                slope = view.inverse(inner.velocity(view.apply(state), t, **condition))
                state = x + 0.5 * (after - now) * slope
            x = x + (after - now) * slope
        torch.testing.assert_close(integrate(field, X, times, solver), x)


@pytest.mark.parametrize(
    "solver", ["heun", "rk4", "heun-euler", "reinterpolate-heun", "rf-solver:1", "dopri5"]
)
def test_alternation_is_refused_where_steps_are_seen_at_their_end(solver: str) -> None:
    field = MultiViewField(model(), VIEWS, combine="alternate", steps=4)
    with pytest.raises(ValueError, match="views that alternate need a solver"):
        integrate(ClassifierFreeGuidance(field, 1.0), X, 4, solver)
    if solver == "heun":
        with pytest.raises(ValueError, match="views that alternate need a solver"):
            CompiledSampler(field, solver)


def test_alternation_takes_every_sample_at_its_own_time() -> None:
    field = MultiViewField(model(), VIEWS, combine="alternate", steps=[0.0, 0.3, 0.7, 1.0])
    times = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
    together = field.velocity(X, times)
    for row, view in enumerate((0, 1, 0)):
        turn, given = VIEWS[view][0], views_of(field)[view]["label"][row : row + 1]
        said = model().velocity(turn.apply(X[row : row + 1]), times[row : row + 1], label=given)
        torch.testing.assert_close(together[row : row + 1], turn.inverse(said))


def test_parts_are_added() -> None:
    low = Part(lambda x: x.mean((-2, -1), keepdim=True).expand_as(x))
    views = [(low, {"label": 1}), (Rest(low), {"label": 2})]
    for prediction in ("velocity", "noise", "data"):
        inner = model("vp", prediction)
        field = MultiViewField(inner, views, combine="sum")
        one, two = (inner.noise(X, T, **alone(label)) for label in (1, 2))
        torch.testing.assert_close(field.noise(X, T), low.filter(one) + two - low.filter(two))
        expected = field.path.convert(field.noise(X, T), X, T, given="noise", wanted="velocity")
        torch.testing.assert_close(field.velocity(X, T), expected, rtol=1e-6, atol=1e-6)
    assert integrate(field, X, TIMES).isfinite().all()


# limit


@pytest.mark.parametrize("rule", ["mean", "balanced", "min-norm", "alternate"])
@pytest.mark.parametrize("rectify", ["none", "official", "matched"])
def test_one_view_is_the_model_in_that_view(rule: str, rectify: str) -> None:
    """Invariant 2."""
    if rule == "alternate" and rectify != "none":
        return
    for view in (Identity(), Rotate(90), Negate()):
        field = MultiViewField(
            model(),
            [(view, {"label": 2})],
            combine=rule,
            rectify=rectify,
            balance=BALANCE if rule == "balanced" else None,
            steps=2,
        )
        found = integrate(field, X, 2)
        wanted = view.inverse(integrate(model(), view.apply(X), 2, **alone(2)))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "matched"])
def test_views_that_are_the_same_are_one(kind: str) -> None:
    """Invariant 3."""
    twice = [(Flip(), {"label": 1})] * 2
    found = integrate(MultiViewField(model(), twice, rectify=kind), X, 3)
    wanted = integrate(MultiViewField(model(), twice[:1]), X, 3)
    torch.testing.assert_close(found, wanted)


# property


@pytest.mark.parametrize("rule", ["mean", "balanced", "min-norm"])
def test_order_of_views_does_not_matter(rule: str) -> None:
    """Invariant 7."""
    settings: dict[str, Any] = {"combine": rule, "rectify": "matched"}
    settings["balance"] = BALANCE if rule == "balanced" else None
    one = MultiViewField(model(), VIEWS, **settings)
    other = MultiViewField(model(), VIEWS[::-1], **settings)
    torch.testing.assert_close(one.velocity(X, T), other.velocity(X, T))


def test_one_batch_or_a_call_for_each_view() -> None:
    for guide in (lambda f: f, lambda f: APG(f, 4.0, norm=1.0)):
        inner = model()
        together = MultiViewField(guide(inner), VIEWS)
        apart = MultiViewField(guide(inner), VIEWS, batched=False)
        torch.testing.assert_close(integrate(together, X, TIMES), integrate(apart, X, TIMES))
    inner.net.calls = 0
    integrate(MultiViewField(inner, VIEWS), X, TIMES)
    assert inner.net.calls == 2
    integrate(MultiViewField(inner, VIEWS, batched=False), X, TIMES)
    assert inner.net.calls == 6


def test_every_view_has_its_own_momentum() -> None:
    """Two views of which neither touches the other: each is the trajectory of its own guidance."""
    half = torch.zeros(1, 4, 4, dtype=torch.float64)
    half[:, :2] = 1
    views: list[tuple[View, dict[str, Any]]] = [
        (Part(lambda x: half * x), {"label": 1}),
        (Part(lambda x: (1 - half) * x), {"label": 2}),
    ]

    class Local(Net):
        def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
            return x * TURNS[label] * t.view(-1, 1, 1, 1)

    guided = APG(FlowModel(Local()), 4.0, eta=1.0, momentum=-0.7)
    for batched in (True, False):
        field = MultiViewField(guided, views, combine="sum", batched=batched)
        assert field.remembers
        found = integrate(field, X, 4)
        upper, lower = (integrate(guided, X, 4, **alone(label)) for label in (1, 2))
        torch.testing.assert_close(found, half * upper + (1 - half) * lower)
        assert torch.equal(found, integrate(field, X, 4)), "nothing is left of the first run"


def test_the_matched_factor_is_finite_at_both_ends() -> None:
    for path in sorted(PATHS):
        for kind in ("official", "matched"):
            field = MultiViewField(model(path), VIEWS, rectify=kind)
            for time in (0.0, 1e-4, 1.0):
                found = field.velocity(X.float(), torch.full((3,), time))
                assert found.isfinite().all(), (path, kind, time)
    plain = MultiViewField(model(), VIEWS)
    near = MultiViewField(model(), VIEWS, rectify="matched")
    early = torch.full_like(T, 1e-6)
    # The factor is 1 + O(t²), of which a velocity keeps O(t).
    torch.testing.assert_close(
        near.velocity(X, early), plain.velocity(X, early), rtol=1e-4, atol=1e-4
    )


def test_what_is_given_when_sampling_is_shared_by_all_views() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, label: Tensor, style: Tensor) -> Tensor:
            return x * 0 + label.view(-1, 1, 1, 1) + 10 * style.view(-1, 1, 1, 1)

    field = MultiViewField(FlowModel(Two()), VIEWS)
    found = field.velocity(X, T, style=torch.tensor([1, 2, 3]))
    assert found[:, 0, 0, 0].tolist() == [11.5, 22, 32.5]


def test_sampling_and_compilation_take_it() -> None:
    inner = FlowModel(Net(), shape=SHAPE[1:])
    views = [(Identity(), {"label": 1}), (Flip(), {"label": 2})]
    found = sample(inner, 5, field=MultiViewField(inner, views), steps=2, batch_size=2)
    assert found.shape == (5, *SHAPE[1:])
    with pytest.raises(ValueError, match="share no memory"):
        CompiledSampler(MultiViewField(APG(inner, 2.0), views))


def test_gradients_reach_the_state_through_every_view() -> None:
    field = MultiViewField(model(), [(v, {"label": 1}) for v, _ in VIEWS], rectify="matched")
    x = X[:1].clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: field.velocity(x, T[:1]), (x,))


# what is refused


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"combine": "means"}, "did you mean 'mean'"),
        ({"rectify": "match"}, "did you mean 'matched'"),
        ({"combine": "balanced"}, "balanced views need a Balance"),
        ({"balance": BALANCE}, "others take none"),
        ({"combine": "alternate"}, "alternate goes by steps: give steps="),
        ({"combine": "alternate", "steps": 0}, "steps must be >= 1"),
        ({"combine": "sum", "rectify": "matched"}, "takes no mean that could lose variance"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MultiViewField(model(), VIEWS, **settings)


def test_wrong_views() -> None:
    class Louder(View):
        def apply(self, x: Tensor) -> Tensor:
            return 2 * x

        def inverse(self, x: Tensor) -> Tensor:
            return x / 2

    with pytest.raises(ValueError, match="there are no views"):
        MultiViewField(model(), [])
    with pytest.raises(ValueError, match="the view Louder is not orthogonal"):
        integrate(MultiViewField(model(), [(Louder(), {"label": 1})]), X, 2)
    with pytest.raises(ValueError, match="the parts must add up to the picture"):
        integrate(MultiViewField(model(), VIEWS, combine="sum"), X, 2)
    with pytest.raises(ValueError, match="it makes 6x4 of 4x6"):
        integrate(MultiViewField(model(), VIEWS), torch.zeros(3, 1, 4, 6), 2)
    rows = [(Identity(), {"label": torch.tensor([1, 2])})]
    with pytest.raises(ValueError, match="one row, or one for each of the 3 samples"):
        integrate(MultiViewField(model(), rows), X, 2)


def test_alternation_with_momentum_and_with_other_conditions_is_refused() -> None:
    with pytest.raises(ValueError, match="not asked about at every step, so a field that remem"):
        MultiViewField(APG(model(), 2.0), VIEWS, combine="alternate", steps=2)
    MultiViewField(APG(model(), 2.0, momentum=0.0), VIEWS, combine="alternate", steps=2)
    other = [VIEWS[0], (Flip(), {})]
    with pytest.raises(ValueError, match="conditions of the same names and shapes, got label and"):
        integrate(MultiViewField(model(), other, combine="alternate", steps=2), X, 2)


def test_guidance_needs_conditions_in_every_view() -> None:
    field = MultiViewField(ClassifierFreeGuidance(model(), 2.0), [VIEWS[0], (Flip(), {})])
    with pytest.raises(ValueError, match="needs a condition to guide toward, got none"):
        integrate(field, X, 2)
