"""What friction does to steps: against a slow reckoning, and in the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rectiflow.diagnose import FrictionWeights, Watch, diagnoses
from rectiflow.flows import FlowModel
from rectiflow.flows.couplings import Independent
from rectiflow.nets import MLP
from rectiflow.optim import DiffGrad
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings

# One change is too small to count and one too large, and one lies in each of three decades.
CHANGES = torch.tensor([0.0, 2e-5, 0.3, -4.0, 1e4], dtype=torch.float64)


@pytest.mark.parametrize("version", ["v0", "v1", "v2"])
def test_one_step_is_reckoned_by_hand(version: str) -> None:
    first = torch.tensor([1.0, -1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = DiffGrad([p], version=version)
    look, found = FrictionWeights(every=2), []
    for step, grad in enumerate((first, first - CHANGES), 1):
        p.grad = grad.clone()
        optimizer.step()
        found.append(look.observe(step, optimizer))
    assert found[0] is None
    report = found[1]
    sigmoid = lambda x: 1 / (1 + torch.exp(-x))  # noqa: E731
    weight = {
        "v0": sigmoid(CHANGES.abs()),
        "v1": sigmoid(CHANGES),
        "v2": 9 * sigmoid(CHANGES.abs() / 2) - 4,
    }[version]
    low, high = (-4, 5) if version == "v2" else (0, 1)
    assert report.step == 2
    assert report.mean == pytest.approx(float(weight.mean()))
    mean = 0.9 * 0.1 * first + 0.1 * (first - CHANGES)
    weighed = mean * weight
    cosine = (mean @ weighed) / (mean.norm() * weighed.norm())
    assert report.cosine == pytest.approx(float(cosine), rel=1e-6)
    places = ((weight - low) / (high - low) * 20).long().clamp(max=19)
    assert report.weights == pytest.approx((torch.bincount(places, minlength=20) / 5).tolist())
    # Half decades from 1e-8: 2e-5 in the seventh, 0.3 in the fifteenth, 4 in the eighteenth.
    shares = {0: 0.2, 6: 0.2, 14: 0.2, 17: 0.2, 19: 0.2}
    assert report.changes == pytest.approx([shares.get(place, 0.0) for place in range(20)])


def test_the_trainer_draws_it_and_is_not_disturbed(tmp_path: Path) -> None:
    def train(folder: Path | None) -> tuple[dict[str, torch.Tensor], Watch]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = FlowModel(MLP(shape=(2,), width=8, depth=1, zero=False), shape=(2,))
        data = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
        method = FlowMatching(model, Independent(data))
        watch = Watch(diagnoses("friction", method, every=3), folder)
        settings = TrainerSettings(steps=7, batch_size=8, optim=OptimizerSettings("diffgrad"))
        callbacks = [] if folder is None else [watch]
        return Trainer(method, settings, callbacks=callbacks).fit().state_dict(), watch

    plain, _ = train(None)
    watched, watch = train(tmp_path)
    assert all(torch.equal(watched[name], value) for name, value in plain.items())
    rows = watch.rows["friction"]
    assert [row["step"] for row in rows] == [3, 6]
    assert all(0.5 <= row["mean"] < 1 for row in rows)
    assert all(sum(row["changes"]) == pytest.approx(1) for row in rows)
    drawn = watch.diagnoses[0].draw(rows, tmp_path)
    assert {path.name for path in drawn} == {"friction.png", "friction-changes.png"}
    assert "mean weight 0.5" in next(iter(drawn.values()))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2


def test_optimizers_without_friction_are_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="this diagnosis is for diffgrad"):
        FrictionWeights().observe(1, torch.optim.Adam([p]))
    with pytest.raises(ValueError, match="every must be > 0"):
        FrictionWeights(every=0)


def test_weights_that_join_later_wait_for_the_next_look() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer, look = DiffGrad([p]), FrictionWeights(every=2)
    for step in (1, 2, 3, 4):
        if step == 2:
            optimizer.add_param_group({"params": [q]})
        for one in (p, q):
            one.grad = torch.ones(2) * step
        optimizer.step()
        found = look.observe(step, optimizer)
        assert (found is not None) == (step == 4)
