"""Shadows: the directions of optimizers whose steps are not taken."""

from __future__ import annotations

import pytest
import torch
from tests.diagnose.tiny import classifier, data, loss_of

from rectiflow.diagnose import Shadows, paper_shadows
from rectiflow.optim import AdamP, CoordinateClipped


def pushed(steps: int, builders, *, rate: float = 0.05):
    """A real training by plain descent with its shadows; gradients and weights of every step."""
    model, batch = classifier(), data()
    shadows = Shadows(model.parameters(), builders)
    grads, weights, found = [], [], []
    for _ in range(steps):
        model.zero_grad()
        loss_of(model)(batch).backward()
        grads.append(torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()]))
        weights.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
        shadows.follow()
        found.append(dict(shadows.directions))
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
    return grads, weights, found


def test_directions_of_the_paper_by_hand() -> None:
    grads, _, found = pushed(6, paper_shadows())
    count = len(grads[0])
    mean = clipped = torch.zeros(count, dtype=torch.float64)
    first, first_clipped, second = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    for step, g in enumerate(grads, 1):

        def clip(fraction: float, g=g):
            tau = g.abs().sort(descending=True).values[int(fraction * count)]
            return g.clamp(-tau, tau)

        mean = g if step == 1 else 0.9 * mean + 0.1 * g
        clipped = clip(0.1) if step == 1 else 0.9 * clipped + 0.1 * clip(0.1)
        first = 0.9 * first + 0.1 * g
        first_clipped = 0.9 * first_clipped + 0.1 * clip(0.5)
        second = 0.999 * second + 0.001 * g**2
        scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
        wanted = {
            "SGD": mean,
            "SGD, clipped": clipped,
            "sign": first.sign(),
            "Adam": first / (1 - 0.9**step) / scale,
            "Adam, clipped": first_clipped / (1 - 0.9**step) / scale,
        }
        for name, direction in wanted.items():
            # Differences of weights of order 1 in float64.
            assert torch.allclose(found[step - 1][name], direction, rtol=0, atol=1e-14), name


def test_a_shadow_of_the_real_optimizer_goes_where_it_goes() -> None:
    model, batch = classifier(), data()
    real = AdamP(model.parameters(), lr=0.01, weight_decay=0.1)
    shadows = Shadows(model.parameters(), {"same": lambda p: AdamP(p, lr=0.01, weight_decay=0.1)})
    for _ in range(5):
        model.zero_grad()
        loss_of(model)(batch).backward()
        shadows.follow()
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        real.step()
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert torch.allclose(before - after, shadows.directions["same"], rtol=0, atol=1e-15)


def test_nothing_of_the_training_is_touched() -> None:
    plain, followed = (pushed(4, builders)[1] for builders in ({"a": _still}, paper_shadows()))
    assert all(map(torch.equal, plain, followed))


def _still(params):
    return torch.optim.SGD(params, lr=1.0)


def test_missing_gradients_and_given_ones() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    shadows = Shadows([used, unused], {"clipped": lambda p: CoordinateClipped(p, lr=1.0)})
    shadows.follow([torch.tensor([1.0, 2.0]), None])
    assert shadows.directions["clipped"][2] == 0
    with pytest.raises(ValueError, match="one optimizer or more"):
        Shadows([used], {})
