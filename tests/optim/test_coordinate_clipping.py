"""Clipping at a quantile: the exact threshold, what it leaves alone, Adam's moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rectiflow.optim import Adam, ClipCoordinates, CoordinateClipped, chain, clip_coordinates_
from rectiflow.optim.coordinate_clipping import SAMPLE, top_threshold
from rectiflow.optim.directions import Momentum


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(values: list[torch.Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros_like(v)) for v in values]
    for p, v in zip(params, values):
        p.grad = v.clone()
    return params


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.5, 0.99])
def test_invariant_1_so_many_are_clipped_and_no_other_touched(fraction) -> None:
    values = [draw(40, 7), draw(11, seed=1), draw(2, 3, 4, seed=2)]
    params = given(values)
    tau = clip_coordinates_(params, fraction)
    changed = 0
    for p, v in zip(params, values):
        inside = v.abs() <= tau
        assert torch.equal(p.grad[inside], v[inside])
        assert (p.grad.abs() <= tau).all() or not fraction
        assert torch.equal(p.grad.sign(), v.sign())
        changed += int((p.grad != v).sum())
    assert changed == int(fraction * sum(v.numel() for v in values))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["normal", "heavy", "mostly zero", "sorted"])
def test_the_threshold_is_exact_for_many_numbers(fraction, kind) -> None:
    values = draw(5 * SAMPLE).float()
    values = {
        "normal": values,
        "heavy": values / draw(5 * SAMPLE, seed=1).float(),
        "mostly zero": values * (torch.arange(5 * SAMPLE) % 20 == 0),
        "sorted": values.sort().values,
    }[kind]
    ordered = values.abs().sort(descending=True).values
    found = top_threshold([values[:99], values[99:].view(-1, 1)], fraction)
    assert torch.equal(found, ordered[int(fraction * len(values))])


@pytest.mark.parametrize("kinds", [("float32", "bfloat16"), ("bfloat16", "float32", "float64")])
@pytest.mark.parametrize("count", [500, SAMPLE])
def test_numbers_of_several_precisions_have_one_threshold(kinds, count) -> None:
    values = [draw(count, seed=i).to(getattr(torch, kind)) for i, kind in enumerate(kinds * 2)]
    params = given(values)
    joined = torch.cat([value.double() for value in values]).abs().sort(descending=True).values
    for fraction in (0.1, 0.5):
        assert float(top_threshold(values, fraction)) == float(joined[int(fraction * len(joined))])
    tau = clip_coordinates_(params, 0.1)
    # To eight bits, where it clips numbers of that precision.
    assert all(p.grad.dtype is v.dtype for p, v in zip(params, values))
    assert all(float(p.grad.abs().max()) <= float(tau) * (1 + 2**-8) for p in params)
    each = clip_coordinates_(params, 0.2, scope="tensor")
    assert len(each) == len(params)
    CoordinateClipped(params, "adam", lr=0.01).step()
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_invariant_2_nothing_clipped_is_the_base(base) -> None:
    a, b = (nn.Parameter(draw(6, 5)) for _ in range(2))
    ours = CoordinateClipped([a], base, lr=0.02, fraction=0.0)
    theirs = {
        "sgd": lambda: torch.optim.SGD([b], lr=0.02, momentum=0.9),
        "adam": lambda: torch.optim.Adam([b], lr=0.02),
    }[base]()
    for seed in range(10):
        a.grad, b.grad = draw(6, 5, seed=seed), draw(6, 5, seed=seed)
        ours.step()
        theirs.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_invariant_2_clipping_scales_with_the_gradient() -> None:
    values = [draw(30), draw(8, seed=1)]
    small, large = given(values), given([64 * v for v in values])
    clip_coordinates_(small, 0.2)
    clip_coordinates_(large, 0.2)
    assert all(torch.equal(64 * p.grad, q.grad) for p, q in zip(small, large))


def test_invariant_3_partition_and_order_do_not_matter() -> None:
    values = draw(1000)
    parts = [values[700:], values[:300].view(20, 15), values[300:700]]
    assert torch.equal(top_threshold([values], 0.13), top_threshold(parts, 0.13))


def test_invariant_6_second_moments_see_the_whole_gradient() -> None:
    a, b = (nn.Parameter(draw(50)) for _ in range(2))
    ours, adam = CoordinateClipped([a], "adam", lr=0.01), torch.optim.Adam([b], lr=0.01)
    for seed in range(5):
        a.grad, b.grad = draw(50, seed=seed), draw(50, seed=seed)
        ours.step()
        adam.step()
    torch.testing.assert_close(
        ours.state[a]["exp_avg_sq"], adam.state[b]["exp_avg_sq"], rtol=1e-12, atol=0
    )
    assert not torch.allclose(ours.state[a]["exp_avg"], adam.state[b]["exp_avg"], rtol=1e-3)


def test_scopes_and_places() -> None:
    values = [draw(40), 100 * draw(40, seed=1)]

    def changed(scope: str, where: str = "gradient") -> list[int]:
        params = given(values)
        groups = [{"params": [p]} for p in params] if scope == "group" else params
        clip = ClipCoordinates(0.25, scope, where)
        chain(Momentum(0.0), clip)(groups, lr=1.0).step()
        return [int(((p + v).abs() > 1e-12).sum()) for p, v in zip(params, values)]

    assert changed("global") == [0, 20]
    assert changed("group") == changed("tensor") == [10, 10]
    assert changed("tensor", "update") == [10, 10]
    assert changed("group", "update") == [10, 10]
    by_tensor = given(values)
    clip_coordinates_(by_tensor, 0.25, scope="tensor")
    assert [int((p.grad != v).sum()) for p, v in zip(by_tensor, values)] == [10, 10]
    by_group = given([*values, draw(60, seed=2)])
    groups = [{"params": by_group[:1]}, {"params": [nn.Parameter(draw(2))]}]
    groups.append({"params": by_group[1:]})
    found = clip_coordinates_(groups, 0.25, scope="group")
    apart = (values[0].abs(), torch.cat([values[1], draw(60, seed=2)]).abs())
    wanted = [v.sort(descending=True).values[len(v) // 4] for v in apart]
    assert torch.equal(found, torch.stack(wanted))
    assert [int((p.grad.abs() == tau).sum()) for p, tau in zip(by_group, found)] == [11, 26]
    with pytest.raises(ValueError, match="takes groups of weights: give"):
        clip_coordinates_(by_group, 0.25, scope="group")
    assert float(clip_coordinates_(groups, 0.0)) == float(found.max())


def test_clipped_updates_are_clipped_adam_steps() -> None:
    p = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    q = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    ours = chain(Adam(), ClipCoordinates(0.3, "group", "update"))([p], lr=1.0)
    adam = torch.optim.Adam([q], lr=1.0)
    for seed in range(3):
        before, other = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = draw(20, seed=seed), draw(20, seed=seed)
        ours.step()
        adam.step()
        update = q.detach() - other
        tau = update.abs().sort(descending=True).values[6]
        torch.testing.assert_close(p - before, update.clamp(-tau, tau), rtol=1e-12, atol=1e-14)


def test_invariant_8_zeros_and_numbers_that_are_none() -> None:
    rare = torch.zeros(100, dtype=torch.float64)
    rare[:4] = torch.tensor([1.0, -2.0, 3.0, 9.0], dtype=torch.float64)
    params = given([rare])
    # A tenth of all is more than there is: a tenth of what is not zero is none of four.
    assert float(clip_coordinates_(params, 0.1)) == 9.0
    assert torch.equal(params[0].grad, rare)
    params = given([torch.zeros(9, dtype=torch.float64)])
    assert float(clip_coordinates_(params, 0.1)) == 0.0
    for bad in (float("nan"), float("inf")):
        params = given([torch.tensor([1.0, bad, 2.0])])
        with pytest.raises(ValueError, match="gradients are not finite"):
            clip_coordinates_(params, 0.1)


def test_bad_settings_are_refused() -> None:
    params = given([draw(3)])
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="clipped fraction must be in"):
            clip_coordinates_(params, fraction)
        with pytest.raises(ValueError, match="clipped fraction must be in"):
            ClipCoordinates(fraction)
    with pytest.raises(ValueError, match="unknown scope 'layer'"):
        ClipCoordinates(scope="layer")
    with pytest.raises(ValueError, match="unknown base optimizer 'adamw'"):
        CoordinateClipped(params, "adamw")


def test_smoothed_thresholds_are_a_running_geometric_mean() -> None:
    grads = [draw(200, seed=step) * 10**step for step in range(5)]
    p = nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = CoordinateClipped([p], Momentum(0.0), lr=1.0, smoothing=0.9, refresh=2)
    wanted = None
    for step, grad in enumerate(grads):
        if step % 2 == 0:
            now = top_threshold([grad], 0.1).log()
            wanted = now if wanted is None else 0.9 * wanted + 0.1 * now
        before, p.grad = p.detach().clone(), grad.clone()
        if step == 3:
            # A new optimizer goes on where the old one was.
            state = optimizer.state_dict()
            optimizer = CoordinateClipped([p], Momentum(0.0), lr=1.0, smoothing=0.9, refresh=2)
            optimizer.load_state_dict(state)
        optimizer.step()
        tau = float(wanted.exp())
        torch.testing.assert_close(before - p.detach(), grad.clamp(-tau, tau))


@pytest.mark.parametrize("scope", ["global", "group"])
def test_smoothed_thresholds_of_groups(scope) -> None:
    large, small = (nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2))
    optimizer = CoordinateClipped(
        [{"params": [large]}, {"params": [small]}],
        Momentum(0.0),
        lr=1.0,
        scope=scope,
        smoothing=0.5,
    )
    for step in range(2):
        large.grad, small.grad = 10 * draw(50, seed=step), draw(50, seed=9 + step)
        optimizer.step()
    logs = [group["clip_log_threshold"] for group in optimizer.param_groups]
    if scope == "global":
        both = [torch.cat([10 * draw(50, seed=s), draw(50, seed=9 + s)]) for s in range(2)]
        expected = [both, both]
    else:
        expected = [
            [10 * draw(50, seed=s) for s in range(2)],
            [draw(50, seed=9 + s) for s in range(2)],
        ]
    for log, rows in zip(logs, expected):
        taus = torch.stack([top_threshold([row], 0.1) for row in rows])
        torch.testing.assert_close(log, taus.log().mean())


def test_gradients_of_zeros_leave_a_smoothed_threshold() -> None:
    p = nn.Parameter(torch.ones(10))
    optimizer = CoordinateClipped([p], Momentum(0.0), lr=1.0, smoothing=0.9)
    for grad in (draw(10).float(), torch.zeros(10), draw(10, seed=1).float()):
        p.grad = grad
        optimizer.step()
    assert p.isfinite().all()
    assert optimizer.param_groups[0]["clip_log_threshold"].isfinite()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"smoothing": 1.0}, "smoothing must be in"),
        ({"smoothing": 0.9, "scope": "tensor"}, "are not smoothed"),
        ({"smoothing": 0.9, "where": "update", "scope": "group"}, "are not smoothed"),
        ({"refresh": 5}, "give smoothing too"),
        ({"smoothing": 0.9, "refresh": 0}, "refresh must be > 0"),
    ],
)
def test_smoothing_that_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ClipCoordinates(**options)


def test_normalized_and_sign_descent() -> None:
    grads = [draw(30, 4), draw(5, seed=1), torch.zeros(3, dtype=torch.float64)]
    for base in ("normalized-sgd", "sign-sgd"):
        params = given(grads)
        optimizer = CoordinateClipped(params, base, lr=0.1, fraction=0.2)
        optimizer.step()
        tau = top_threshold(grads, 0.2)
        for p, grad in zip(params, grads):
            clipped = grad.clamp(-tau, tau)
            size = clipped.norm() / clipped.numel() ** 0.5
            wanted = clipped / size if base == "normalized-sgd" and size > 0 else clipped.sign()
            torch.testing.assert_close(p.detach(), -0.1 * wanted)
            if size > 0:
                # The memory is of the clipped gradient, not of the step.
                torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], clipped)
