"""Friction: its range, its limits, the aliasing it must not have, agreement with Adam and peers."""

from __future__ import annotations

import math
import warnings

import pytest
import pytorch_optimizer
import torch
from torch import nn

from rectiflow.optim import Adam, DiffGrad, Friction, chain


def weight(value=(1.0, -2.0, 0.5)) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def grads(steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(steps)]


def go(optimizer, p, given) -> torch.Tensor:
    for grad in given:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach().clone()


def test_invariant_1_a_constant_gradient_halves_the_step() -> None:
    a, b = weight(), weight()
    ours, adam = DiffGrad([a], lr=0.1, eps=0.0), torch.optim.Adam([b], lr=0.1, eps=0.0)
    same = torch.tensor([0.3, -4.0, 1e-3], dtype=torch.float64)
    for step in range(5):
        before, other = a.detach().clone(), b.detach().clone()
        a.grad, b.grad = same.clone(), same.clone()
        ours.step()
        adam.step()
        share = torch.full_like(same, 0.5) if step else torch.sigmoid(same.abs())
        torch.testing.assert_close(a - before, share * (b - other), rtol=1e-12, atol=0)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_invariant_2_without_friction_it_is_adam(amsgrad) -> None:
    a, b = weight(), weight()
    still = Friction(scale=0.0, offset=1.0)
    options = {"lr": 0.05, "amsgrad": amsgrad}
    ours = DiffGrad([a], friction=still, eps_mode="corrected", **options)
    given = grads(30)
    found, wanted = go(ours, a, given), go(torch.optim.Adam([b], **options), b, given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_rectified_adam_is_that_of_torch() -> None:
    a, b = weight(), weight()
    ours = chain(Adam(rectify=True))([a], lr=0.05)
    given = grads(30)
    found, wanted = go(ours, a, given), go(torch.optim.RAdam([b], lr=0.05), b, given)
    # torch adds eps to the root before the correction.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_invariant_3_gradients_kept_in_place_change_nothing() -> None:
    a, b = weight(), weight()
    first, second = DiffGrad([a]), DiffGrad([b])
    kept = torch.zeros(3, dtype=torch.float64)
    b.grad = kept
    for grad in grads(10):
        a.grad = grad.clone()
        kept.copy_(grad)
        first.step()
        second.step()
        assert b.grad is kept
        assert torch.equal(a, b)


def test_invariant_4_friction_is_between_a_half_and_one() -> None:
    for change, wanted in ((0.0, 0.5), (1e4, 1.0), (-1e4, 1.0), (2.0, 1 / (1 + math.exp(-2)))):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        rule = chain(_Plain(), Friction())([p], lr=1.0)
        before = torch.full((1,), 1.0 + change, dtype=torch.float64)
        saved = rule.state_dict()
        saved["state"] = {0: {"step": torch.tensor(1.0), "previous_grad": before}}
        rule.load_state_dict(saved)
        p.grad = torch.ones(1, dtype=torch.float64)
        rule.step()
        assert float(-p) == pytest.approx(wanted, rel=1e-12)


def test_invariant_5_mirrored_problems_have_mirrored_paths() -> None:
    def walk(sign: float, version: str) -> torch.Tensor:
        p = nn.Parameter(sign * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        optimizer = DiffGrad([p], lr=0.1, version=version)
        return go(optimizer, p, [sign * g for g in grads(8)])

    assert torch.equal(walk(1.0, "v0"), -walk(-1.0, "v0"))
    assert not torch.allclose(walk(1.0, "v1"), -walk(-1.0, "v1"))


@pytest.mark.parametrize("scale, share", [(1e6, 1.0), (1e-6, 0.5)])
def test_invariant_6_the_size_of_gradients_decides(scale, share) -> None:
    a, b = weight(), weight()
    given = grads(10, scale)
    found = go(DiffGrad([a], lr=0.1, eps=0.0), a, given)
    wanted = go(torch.optim.Adam([b], lr=0.1 * share, eps=0.0), b, given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_relative_friction_does_not_depend_on_the_size_of_gradients() -> None:
    ends = []
    for scale in (1.0, 1e5):
        p = weight()
        friction = Friction(relative=True)
        ends.append(go(DiffGrad([p], lr=0.1, eps=0.0, friction=friction), p, grads(10, scale)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_invariant_8_gradients_stay_as_they_are() -> None:
    p = weight()
    optimizer = DiffGrad([p], weight_decay=0.3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.grad, torch.ones_like(p))


def test_invariant_9_agrees_with_a_peer() -> None:
    a, b = weight(), weight()
    theirs = pytorch_optimizer.DiffGrad([b], lr=0.05, weight_decay=0.0)
    given = grads(3)
    found, wanted = go(DiffGrad([a], lr=0.05), a, given), go(theirs, b, given)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_state_of_adam_is_a_start() -> None:
    a, b = weight(), weight()
    adam, ours = torch.optim.Adam([a], lr=0.1), DiffGrad([b], lr=0.1)
    go(adam, a, grads(3))
    ours.load_state_dict(adam.state_dict())
    b.grad = torch.ones_like(b)
    ours.step()
    assert int(ours.state[b]["step"]) == 4
    assert torch.equal(ours.state[b]["previous_grad"], torch.ones_like(b))


def test_friction_that_may_reverse_is_said() -> None:
    with pytest.warns(UserWarning, match="can be negative"):
        Friction.preset("v3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 9 / 2 - 4 at least, and 10 / 2 - 5.
        assert Friction.preset("v2").offset == -4
        assert Friction.preset("v4").offset == -5
    with pytest.raises(ValueError, match="unknown friction 'v9'"):
        DiffGrad([weight()], version="v9")


class _Plain(Adam):
    """The gradient itself as the direction."""

    @property
    def slots(self):
        return ()

    def apply(self, stretch) -> None:
        stretch.direction = stretch.gradient
