"""Reports of opposing signals against autograd by hand, and what they must not change."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from tests.diagnose.tiny import classifier, data, dense, net, probe
from torch import nn
from torch.nn import functional

from rectiflow.diagnose import Hessian, OpposingSignals, SampleProbe, sample_losses
from rectiflow.diagnose.opposing_signals import QUANTILES

RATE = 0.3


def descend(watched: SampleProbe, steps: int, look: OpposingSignals | None = None, first: int = 1):
    """Full-batch descent with looks on; the reports."""
    optimizer = torch.optim.SGD(watched.model.parameters(), lr=RATE)
    found = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        watched.losses(torch.arange(len(watched))).mean().backward()
        optimizer.step()
        if look is not None:
            found.append(look.observe(step, optimizer))
    return found


def flat_gradient(watched: SampleProbe, group) -> torch.Tensor:
    loss = watched.losses(torch.as_tensor(group)).mean()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, watched.model.parameters())])


def test_a_report_by_hand() -> None:
    watched = probe()
    look = OpposingSignals(watched, every=2, size=3, controls=2)
    descend(watched, 1, look)
    before = sample_losses(watched)
    (report,) = descend(watched, 1, look, first=2)
    after = sample_losses(watched)
    change = after - before
    order = change.argsort(descending=True).tolist()
    plus, minus = order[:3], order[::-1][:3]
    assert (list(report.idx_plus), list(report.idx_minus)) == (plus, minus)
    assert report.step == 2
    assert report.loss == pytest.approx(float(after.mean()))
    assert report.change == pytest.approx(float(change.mean()))
    assert report.loss_plus == pytest.approx(float(after[plus].mean()))
    assert report.change_minus == pytest.approx(float(change[minus].mean()))
    share = change[plus + minus].abs().sum() / change.abs().sum()
    assert report.share == pytest.approx(float(share))
    assert report.swapped is None, "two losses are too few to see groups swap"
    assert report.change_quantiles[0] == pytest.approx(float(change.min()))
    assert report.change_quantiles[4] == pytest.approx(float(change.median()), abs=0.1)
    assert len(report.change_quantiles) == len(QUANTILES)

    g_plus, g_minus = flat_gradient(watched, plus), flat_gradient(watched, minus)

    def cos(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(functional.cosine_similarity(a, b, 0))

    assert report.cos_pm == pytest.approx(cos(g_plus, g_minus))
    both = float(g_plus.norm() + g_minus.norm())
    assert report.cancellation == pytest.approx(float((g_plus + g_minus).norm()) / both)

    x, y = watched.inputs, watched.targets
    matrix = dense(watched.model, lambda answer: functional.cross_entropy(answer(x), y))
    values, vectors = torch.linalg.eigh(matrix)
    v = vectors[:, -1]
    # A residual of 1e-2 leaves the eigenvalue 1e-4 and the vector some 1e-2 over the gap.
    assert report.sharpness == pytest.approx(float(values[-1]), rel=1e-3)
    assert report.eta_lambda == pytest.approx(RATE * report.sharpness)
    assert abs(report.proj_plus) == pytest.approx(abs(cos(g_plus, v)), abs=0.03)
    assert report.proj_plus * report.proj_minus == pytest.approx(
        cos(g_plus, v) * cos(g_minus, v), abs=0.03
    )
    part = dense(watched.model, lambda a: functional.cross_entropy(a(x[plus]), y[plus]))
    assert report.curvature_plus == pytest.approx(float(v @ part @ v), rel=0.05)
    counts = torch.bincount(y[plus], minlength=3)
    assert report.label_counts["plus"] == {i: int(n) for i, n in enumerate(counts) if n}


def test_exact_pairs_oppose_exactly() -> None:
    # Same signal and target, opposite features, no weight on the feature yet.
    signal = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)).double()
    feature = torch.ones(6, 2, dtype=torch.float64)
    inputs = torch.cat([signal.repeat(2, 1), torch.cat([feature, -feature])], 1)

    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.signal = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
            self.feature = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.5 * (x[:, :1] @ self.signal + x[:, 1:] @ self.feature)

    model = TwoLayers()
    watched = SampleProbe(
        model, inputs, signal.repeat(2, 1).squeeze(1) + 3, lambda out, y: (out - y).square() / 2
    )
    groups = (torch.arange(6), torch.arange(6, 12))
    slopes = [
        Hessian(lambda i: watched.losses(i).mean(), [model.feature], [group]).gradient()
        for group in groups
    ]
    assert torch.equal(slopes[0], -slopes[1])
    assert float(slopes[0].norm()) > 1
    # A step along the feature alone, so small that gradients stay as they are.
    model.signal.requires_grad_(False)
    look = OpposingSignals(watched, every=1, size=4)
    look.observe(1)
    with torch.no_grad():
        model.feature += 1e-9
    report = look.observe(2)
    assert {*report.idx_plus, *report.idx_minus} <= set(range(12))
    assert all(i >= 6 for i in report.idx_plus)
    assert all(i < 6 for i in report.idx_minus)
    assert report.cos_pm == pytest.approx(-1)
    assert report.proj_plus * report.proj_minus == pytest.approx(-1)
    assert report.curvature_plus == pytest.approx(1.5**2 * 2)


def test_a_permuted_probe_gives_a_permuted_report() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    x, y = data()
    plain, moved = (
        descend(p, 3, OpposingSignals(p, every=3, size=3))[-1]
        for p in (SampleProbe(classifier(), x, y), SampleProbe(classifier(), x[order], y[order]))
    )
    assert tuple(order[list(moved.idx_plus)].tolist()) == plain.idx_plus
    assert tuple(order[list(moved.idx_minus)].tolist()) == plain.idx_minus
    drawn = ("idx_plus", "idx_minus", "cos_rand", "cos_labels", "norm_ratio", "label_counts")
    for name, value in asdict(plain).items():
        if name not in drawn:
            # Sums in another order; the sharpest direction is found from the same start.
            assert getattr(moved, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert moved.label_counts == plain.label_counts


def test_swapped_groups_swap_what_belongs_to_them() -> None:
    watched = probe()
    look = OpposingSignals(watched, every=1, size=3)
    descend(watched, 2, look)
    losses = torch.stack(list(look._recent))
    one, other = (look._report(2, given, RATE) for given in (losses, losses.flip(0)))
    assert (other.idx_plus, other.idx_minus) == (one.idx_minus, one.idx_plus)
    assert other.cos_pm == pytest.approx(one.cos_pm)
    assert other.proj_plus == pytest.approx(one.proj_minus, abs=0.02)
    assert other.share == pytest.approx(one.share)
    assert other.change == pytest.approx(-one.change)


def test_when_it_looks() -> None:
    def due(steps: int, **options) -> list[int]:
        watched = probe(24)
        look = OpposingSignals(watched, size=2, sharpness=False, **options)
        found = descend(watched, steps, look)
        assert look.steps == sorted(set(look.steps))
        return [report.step for report in found if report is not None]

    assert due(10, every=5) == [5, 10]
    assert due(4, every=1) == [2, 3, 4]
    # Four changes need five consecutive losses.
    assert due(10, every=5, window=4) == [5, 10]
    assert due(9, every=3, window=4) == [6, 9]


def test_only_needed_losses_are_taken() -> None:
    watched = probe()
    look = OpposingSignals(watched, every=5, size=2, sharpness=False)
    descend(watched, 10, look)
    assert look.steps == [3, 4, 5, 8, 9, 10]
    assert look.history([0, 3]) == pytest.approx(
        [float(losses[[0, 3]].mean()) for losses in look.losses]
    )


def test_rises_are_reported() -> None:
    watched = probe()
    look = OpposingSignals(watched, every=1000, on_rise=True, size=2, sharpness=False)
    descend(watched, 3, look)
    with torch.no_grad():
        watched.model[2].weight.mul_(-1)
    report = look.observe(4)
    assert report is not None
    assert report.change > 0
    assert report.eta_lambda is None
    assert report.sharpness is None


def test_groups_of_a_window_are_those_that_swing() -> None:
    watched = probe()
    look = OpposingSignals(watched, every=4, window=4, size=1, sharpness=False)
    swing = torch.zeros(5, 12)
    swing[:, 7] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    swing[:, 2] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    # A single rise, less than the swings.
    swing[4, 5] = 1.8
    report = look._report(4, swing.double(), None)
    assert report.idx_plus == (2,)
    assert report.idx_minus == (7,)


def test_groups_that_swap_sides_are_counted() -> None:
    look = OpposingSignals(probe(), every=1, size=2, sharpness=False)
    losses = torch.zeros(3, 12, dtype=torch.float64)
    losses[1, :4] = torch.tensor([5.0, -5.0, 1.0, -1.0])
    # Of G-, 1 and 3, both rise now; then only one of them is among those that rise most.
    assert look._report(2, losses, None).swapped == 1
    losses[2, 9] = 7
    assert look._report(2, losses, None).swapped == 0.5
    assert look._report(2, losses[1:], None).swapped is None


def test_nothing_of_the_training_changes() -> None:
    def train(*, looked: bool):
        layers = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        model = net(*layers).train()
        watched = SampleProbe(model, *data())
        look = OpposingSignals(watched, every=2, size=3, batch_statistics=looked)
        torch.manual_seed(0)
        reports = descend(watched, 6, look if looked else None)
        return model.state_dict(), [report for report in reports if report]

    (plain, _), (watched, reports) = train(looked=False), train(looked=True)
    assert len(reports) == 3
    for name, value in plain.items():
        assert torch.equal(watched[name], value), name


def test_batch_statistics_are_those_of_the_whole_probe() -> None:
    watched = SampleProbe(net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train(), *data())
    look = OpposingSignals(watched, every=1, size=3, sharpness=True, batch_statistics=True)
    report = next(report for report in descend(watched, 2, look) if report)
    everything = torch.arange(12)
    slopes = [
        torch.cat([
            g.reshape(-1)
            for g in torch.autograd.grad(
                watched.losses(everything)[list(group)].mean(), watched.model.parameters()
            )
        ])
        for group in (report.idx_plus, report.idx_minus)
    ]  # fmt: skip
    assert report.cos_pm == pytest.approx(float(functional.cosine_similarity(*slopes, 0)))


def test_reports_are_reproduced() -> None:
    one, two = (
        descend(p, 4, OpposingSignals(p, every=2, size=3, batch_size=5, seed=4))
        for p in (probe(), probe())
    )
    assert one == two


def test_samples_in_batches_are_the_same_samples() -> None:
    one, two = (
        descend(p, 2, OpposingSignals(p, every=2, size=3, batch_size=size))[-1]
        for p, size in ((probe(), None), (probe(), 5))
    )
    assert two.idx_plus == one.idx_plus
    assert two.sharpness == pytest.approx(one.sharpness, rel=1e-9)


def test_refusals() -> None:
    watched = probe()
    with pytest.raises(ValueError, match="two groups of 7 need 14 samples, got 12"):
        OpposingSignals(watched, size=7)
    with pytest.raises(ValueError, match="every must be > 0"):
        OpposingSignals(watched, every=0)
    with pytest.raises(ValueError, match="12 inputs, 3 labels"):
        SampleProbe(watched.model, watched.inputs, watched.targets, labels=torch.arange(3))
