"""The cosine test against what the optimizer really projects, growth of weights, win rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.diagnose.tiny import data, net
from torch import nn

from rectiflow.diagnose import (
    SampleProbe,
    ScaleInvariance,
    WinRate,
    feature_response,
    invariance_report,
)
from rectiflow.diagnose.watch import as_row
from rectiflow.optim import SGDP, AdAdaGrad, AdAdaGradNorm, SophiaG


def normed() -> nn.Sequential:
    """A layer in front of a normalisation, a head behind it."""
    return net(
        nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), seed=2
    ).train()


def descent(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate)


def test_the_layer_in_front_of_a_norm_is_found_and_no_other() -> None:
    model = normed()
    watched = SampleProbe(model, *data())
    report = ScaleInvariance(watched, every=1).observe(3, descent(model, 0.5))
    assert report.step == 3
    kinds = {name: found.kind for name, found in report.weights.items()}
    assert kinds == {
        "0.weight": "channels", "1.weight": "none", "1.bias": "none",
        "3.weight": "none", "3.bias": "none",
    }  # fmt: skip
    found = report.weights["0.weight"]
    # The norm's own eps makes the layer invariant only up to 1e-5 over the variance.
    assert found.by_channel < 1e-4
    assert found.norm == pytest.approx(float(model[0].weight.detach().norm()))
    assert found.effective_rate == pytest.approx(0.5 / found.norm**2)
    adam = ScaleInvariance(watched, every=1).observe(3, torch.optim.Adam(model.parameters(), 0.5))
    assert adam.weights["0.weight"].effective_rate == pytest.approx(0.5 / found.norm)
    for kind in (AdAdaGrad, AdAdaGradNorm, SGDP):
        given = kind(model.parameters(), 0.5)
        turning = ScaleInvariance(watched, every=1).observe(3, given).weights["0.weight"]
        power = 2 if kind is SGDP else 1
        assert turning.effective_rate == pytest.approx(0.5 / found.norm**power)


def test_it_agrees_with_the_projection_of_the_optimizer() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {name: drawn(4, 3, 2, 2) for name in ("rows", "whole", "neither")}
    weights["vector"] = drawn(5)
    gradients = {name: drawn(*weight.shape) for name, weight in weights.items()}
    flat, slope = weights["rows"].flatten(1), gradients["rows"].flatten(1)
    share = (flat * slope).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True)
    gradients["rows"] = (slope - share * flat).view(4, 3, 2, 2)
    share = (weights["whole"] * gradients["whole"]).sum() / weights["whole"].square().sum()
    gradients["whole"] = gradients["whole"] - share * weights["whole"]
    gradients["neither"] = gradients["neither"] + weights["neither"]
    report = invariance_report(weights, gradients)
    assert {name: found.kind for name, found in report.items()} == {
        "rows": "channels", "whole": "tensor", "neither": "none", "vector": "none",
    }  # fmt: skip
    for name, found in report.items():
        weight, gradient = weights[name], gradients[name]
        p = nn.Parameter(weight.clone())
        optimizer = SGDP([p], lr=1.0, momentum=0.9)
        p.grad = gradient.clone()
        optimizer.step()
        # Momentum that points along the weight: what the next step keeps of it tells the kind.
        with torch.no_grad():
            p.copy_(weight)
        optimizer.state[p]["momentum_buffer"].copy_(weight)
        optimizer.step()
        moved = weight - p.detach()
        rows = (moved * weight).flatten(1).sum(1) if weight.ndim > 1 else moved * weight
        kept = {
            "channels": float(rows.abs().max()) < 1e-6,
            "tensor": abs(float(rows.sum())) < 1e-6 < float(rows.abs().max()),
            "none": torch.allclose(moved, 0.9 * weight + gradient),
        }
        assert [kind for kind, seen in kept.items() if seen] == [found.kind], name


def test_growth_is_that_of_lengths(tmp_path: Path) -> None:
    model = normed()
    look = ScaleInvariance(SampleProbe(model, *data()), every=2)
    rows = []
    for step in range(1, 5):
        report = look.observe(step, descent(model, 0.1))
        assert (report is None) == (step % 2 == 1)
        if report is not None:
            rows.append(as_row(report))
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    first, last = (row["weights"]["0.weight"] for row in rows)
    assert last["norm"] / first["norm"] == pytest.approx(2.25)
    assert first["effective_rate"] / last["effective_rate"] == pytest.approx(2.25**2)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0
    ((picture, caption),) = look.draw(rows, tmp_path).items()
    assert picture.is_file()
    assert "1 of 5" in caption
    assert "2.25 times" in caption


def test_refusals_of_the_report() -> None:
    with pytest.raises(ValueError, match="none for 'b'"):
        invariance_report({"b": torch.ones(2, 2)}, {})
    with pytest.raises(ValueError, match="delta"):
        invariance_report({}, {}, delta=-1.0)
    empty = invariance_report({"a": torch.zeros(2, 2)}, {"a": torch.zeros(2, 2)})["a"]
    assert (empty.kind, empty.effective_rate) == ("channels", None)


def test_win_rate_is_the_optimizers(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = SophiaG([weight], gamma=1.0)
    weight.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[weight]["hessian"].copy_(torch.tensor([0.0, 0.01, 1.0, 1.0]))
    look = WinRate(every=5)
    assert look.observe(4, optimizer) is None
    report = look.observe(5, optimizer)
    assert report.win_rate == optimizer.win_rate() == 0.5
    ((picture, _),) = look.draw([as_row(report)], tmp_path).items()
    assert picture.is_file()
    with pytest.raises(ValueError, match="SGD has no win rate"):
        look.observe(1, torch.optim.SGD([weight], lr=0.1))


def test_response_to_a_feature() -> None:
    model = net(nn.Flatten(), nn.Linear(8, 3, bias=False))
    features = torch.ones(2, 2, 2, 2, dtype=torch.float64)
    features[1] *= -4
    found = feature_response(model, features)
    matrix = model[1].weight.detach()
    assert torch.allclose(found.output, features.flatten(1) @ matrix.T)
    wanted = (matrix @ torch.ones(8, dtype=torch.float64)).norm() / 8**0.5
    assert torch.allclose(found.sensitivity, wanted.expand(2))
    with pytest.raises(ValueError, match="zeros"):
        feature_response(model, 0 * features)
