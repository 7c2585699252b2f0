"""Diagnoses in the trainer: files, plots, resume, and a training that does not notice them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.diagnose.tiny import classifier, data, dense, probe
from torch.nn import functional

from rectiflow.diagnose import (
    DIAGNOSES,
    Diagnosis,
    FlowProbe,
    OpposingSignals,
    SampleProbe,
    ScaleInvariance,
    Sharpness,
    Watch,
    WinRate,
    diagnoses,
    parse_diagnoses,
    sample_losses,
)
from rectiflow.diagnose.watch import as_row
from rectiflow.distill import PhasedRectifiedDiffusion
from rectiflow.flows import FlowModel, PhasedPairs
from rectiflow.flows.couplings import Draw, Independent, TensorData
from rectiflow.nets import MLP
from rectiflow.recipes.catalog import SYSTEMS
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings


def method(seed: int = 0) -> FlowMatching:
    """A conditional flow of tiny images, with dropout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 2, 2, generator=generator) * 2 - 1
    labels = torch.arange(40) % 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MLP(shape=(1, 2, 2), width=8, depth=1, classes=3, dropout=0.2, zero=False)
    return FlowMatching(
        FlowModel(net, shape=(1, 2, 2)), Independent(TensorData(images, {"label": labels}))
    )


def train(folder: Path | None, names: str = "", *, steps: int = 6, resume: bool = False):
    flow = method()
    settings = TrainerSettings(
        steps=steps,
        batch_size=8,
        checkpoint_every=3,
        optim=OptimizerSettings(learning_rate=0.01, schedule="linear"),
    )
    look = diagnoses(names, flow, every=3, count=24, batch_size=10)
    watch = Watch(look, folder)
    torch.manual_seed(1)
    trainer = Trainer(flow, settings, folder=folder, callbacks=[watch] if names else [])
    return trainer.fit(resume=resume).state_dict(), watch


def test_training_does_not_notice_and_files_are_left(tmp_path: Path) -> None:
    plain, _ = train(None)
    names = "sharpness,opposing-signals,scale-invariance"
    watched, watch = train(tmp_path, names)
    for name, value in plain.items():
        assert torch.equal(watched[name], value), name
    folder = tmp_path / "diagnose"
    for name in names.split(","):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [3, 6]
        assert [row["step"] for row in watch.rows[name]] == [3, 6]
    rows = watch.rows["opposing-signals"]
    assert len(rows[0]["idx_plus"]) == 10
    assert sum(rows[0]["label_counts"]["plus"].values()) == 10
    # The rate falls from 0.01 to 0 over six steps; the third was the one of number 2.
    row = watch.rows["sharpness"][0]
    assert row["eta_lambda"] == pytest.approx(0.01 * (1 - 2 / 6) * row["sharpness"])
    assert {path.name for path in folder.glob("*.png")} == {
        "opposing-losses.png", "opposing-sharpness.png", "opposing-cosines.png",
        "opposing-samples.png", "sharpness.png",
    }  # fmt: skip
    # No weight of this network stands in front of a normalisation alone.
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert all(f"<h2>{name}</h2>" in page for name in names.split(","))
    # Resumed from step 3, the later line is written again and the earlier one kept.
    for checkpoint in (tmp_path / "checkpoints").glob("*6*"):
        checkpoint.unlink() if checkpoint.is_file() else _remove(checkpoint)
    resumed, again = train(tmp_path, "sharpness", resume=True)
    assert [row["step"] for row in again.rows["sharpness"]] == [3, 6]
    first, last = (watch.rows["sharpness"], again.rows["sharpness"])
    assert last[0] == first[0]
    # Started anew, the search for the sharpest direction ends elsewhere within its tolerance.
    assert last[1]["sharpness"] == pytest.approx(first[1]["sharpness"], rel=1e-2)
    assert all(torch.equal(resumed[name], value) for name, value in plain.items())


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def test_a_flow_probe_is_what_flow_matching_regresses_on() -> None:
    flow = method()
    watched = FlowProbe(flow, 12, seed=5)
    draw = Draw.of(12, seed=5 + 7_654_321)
    pairs = flow.coupling.draw(draw)
    t = flow.times.sample(12, generator=draw.generator)
    with torch.no_grad():
        wanted = flow.losses(pairs, t, pairs.condition)
    flow.model.eval()
    assert torch.allclose(
        sample_losses(watched, batch_size=5), flow.losses(pairs, t, pairs.condition).detach()
    )
    assert wanted.shape == (12,)
    assert torch.equal(watched.labels, pairs.condition["label"])
    assert torch.equal(watched.pictures(torch.tensor([3])), pairs.target[[3]])
    other = FlowProbe(flow, 12, seed=6)
    assert not torch.equal(other.drawn[1], watched.drawn[1])

    class Other(FlowMatching):
        def loss(self, draw: Draw) -> torch.Tensor:
            return draw.normal((1,)).mean()

    with pytest.raises(ValueError, match="Other has no loss of single pairs"):
        FlowProbe(Other(flow.model, flow.coupling))


def test_pairs_that_hold_more_than_pairs_are_cut_row_by_row() -> None:
    model = FlowModel(MLP(shape=(2,), width=8, depth=1, zero=False), shape=(2,))
    flow = PhasedRectifiedDiffusion(model, PhasedPairs(model, torch.randn(20, 2), 2, 4))
    watched = FlowProbe(flow, 6)
    assert torch.allclose(
        sample_losses(watched, batch_size=1), sample_losses(watched), rtol=1e-4, atol=1e-6
    )


def test_sharpness_by_hand() -> None:
    model, (x, y) = classifier(), data()
    look = Sharpness(SampleProbe(model, x, y), every=3, layers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(1, 4):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        optimizer.step()
        report = look.observe(step, optimizer)
        assert (report is None) == (step < 3)
    matrix = dense(model, lambda answer: functional.cross_entropy(answer(x), y))
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    v = before - after
    assert report.sharpness == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3)
    assert report.eta_lambda == pytest.approx(0.2 * report.sharpness)
    assert report.along_step == pytest.approx(float(v @ matrix @ v / (v @ v)), rel=1e-6)
    assert report.loss == pytest.approx(float(functional.cross_entropy(model(x), y).detach()))
    top = torch.linalg.eigvalsh(matrix[20:, 20:])[-1]
    assert report.layers["2"] == pytest.approx(float(top), rel=1e-3)
    assert 0 < report.cosine <= 1
    # Weights that did not move have no direction.
    still = Sharpness(SampleProbe(model, x, y), every=2)
    still.observe(1)
    report = still.observe(2)
    assert (report.along_step, report.cosine, report.eta_lambda, report.layers) == (
        None, None, None, {},
    )  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_weights_without_finite_losses_have_no_report(bad) -> None:
    watched = probe()
    looks = (
        Sharpness(watched, every=1, layers=True),
        OpposingSignals(watched, every=1, size=2),
    )
    assert looks[1].observe(1) is None
    with torch.no_grad():
        watched.model[2].weight[0, 0] = bad
        watched.model[2].weight[1] = -bad
        watched.model[0].weight.mul_(bad)
    if bad == 1e200:
        # The losses themselves are finite; some of their gradients are not.
        watched.model[2].weight.data.fill_(1e150)
        watched.model[2].weight.register_hook(lambda slope: slope * torch.inf)
    assert all(look.observe(2) is None for look in looks)


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    for diagnosis in (OpposingSignals(probe()), Sharpness(probe()), ScaleInvariance(probe())):
        assert diagnosis.draw([], tmp_path) == {}


def test_layers_have_a_plot(tmp_path: Path) -> None:
    look = Sharpness(probe(), every=1, layers=True)
    drawn = look.draw([as_row(look.observe(step)) for step in (1, 2)], tmp_path)
    assert [path.name for path in drawn] == ["sharpness.png", "sharpness-layers.png"]
    assert all(path.is_file() for path in drawn)


def test_win_rate_is_that_of_the_trainers_optimizer() -> None:
    flow, watch = method(), Watch([WinRate(every=2)])
    optim = OptimizerSettings("sophiag", curvature_every=1, gamma=10.0)
    trainer = Trainer(flow, TrainerSettings(steps=2, batch_size=8, optim=optim), callbacks=[watch])
    trainer.fit()
    (row,) = watch.rows["win-rate"]
    assert row == {"step": 2, "win_rate": trainer.optimizers[0].win_rate()}
    assert 0 < row["win_rate"] < 1
    # Another optimizer is refused at the first step, not at the first look.
    with pytest.raises(ValueError, match="Adam has no win rate"):
        Trainer(flow, TrainerSettings(steps=2, batch_size=8), callbacks=[watch]).fit()


def test_names() -> None:
    made = diagnoses(",".join(DIAGNOSES), method(), every=7)
    assert [diagnosis.name for diagnosis in made] == list(DIAGNOSES)
    assert all(isinstance(diagnosis, Diagnosis) and diagnosis.every == 7 for diagnosis in made)
    systems = {system.slug for system in SYSTEMS}
    assert {entry.system for entry in DIAGNOSES.values()} <= systems
    with pytest.raises(ValueError, match="did you mean 'sharpness'"):
        diagnoses("sharpnes", method())
    with pytest.raises(ValueError, match="named twice"):
        parse_diagnoses("sharpness,sharpness")
    # What needs no probe takes any method.
    assert [look.name for look in diagnoses("win-rate", object())] == ["win-rate"]
