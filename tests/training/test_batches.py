"""Batches of a training: how they are cut, and that growing ones train exactly what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectiflow.flows import FlowModel, Independent
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.nets import build
from rectiflow.training import FlowMatching, OptimizerSettings, Phase, Trainer, TrainerSettings
from rectiflow.training.batches import Batches, GrowthSettings
from rectiflow.training.records import read_log

DATA = torch.randn(100, 2, generator=torch.Generator().manual_seed(5)) + 1
GROWTH = GrowthSettings(first=8, largest=48, micro=16, eta=0.3, interval=2, parts=3)


def make_model() -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return FlowModel(build("mlp", shape=(2,), width=8, depth=1, zero=False), shape=(2,))


def trainer(steps: int = 8, folder: Path | None = None, data=DATA, **changes) -> Trainer:
    options = {"batch_size": "auto", "growth": GROWTH, "checkpoint_every": 1, "log_every": 1}
    return Trainer(
        FlowMatching(make_model(), Independent(data)),
        TrainerSettings(steps=steps, ema=0.9, **{**options, **changes}),
        folder=folder,
    )


def weights(model: FlowModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Oracle


def test_noise_is_the_variance_of_the_parts_gradients():
    found = trainer(1, growth=replace(GROWTH, first=11))
    found.fit()
    (record,) = found.batches.controller.records
    model, gradients = make_model(), []
    method = FlowMatching(model, Independent(DATA))
    for first in (0, 3, 6):  # three equal parts of a batch of eleven; the last two rows are left
        loss = method.loss(Draw.of(11, part=slice(first, first + 3)))
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in parts]))
    stacked = torch.stack(gradients)
    # A mean of three samples varies a third as much as one.
    assert record.noise == pytest.approx(3 * float(stacked.var(0).sum()), rel=1e-4)
    assert record.signal == pytest.approx(float(stacked.mean(0).square().sum()), rel=1e-4)


# Limits


def test_tests_that_always_pass_train_as_a_constant_batch():
    grown = trainer(6, growth=replace(GROWTH, eta=1e6)).fit()
    constant = trainer(6, batch_size=8, growth=GrowthSettings()).fit()
    # Sums over parts and over the whole round differently.
    torch.testing.assert_close(weights(grown), weights(constant), rtol=1e-5, atol=1e-6)


# Properties


def test_samples_may_be_counted_in_place_of_steps(tmp_path):
    growth = replace(GROWTH, samples=200)
    optim = OptimizerSettings(learning_rate=0.01, schedule="linear")
    seen = []

    def look(one: Trainer, step: int) -> None:
        (group,) = one.optimizers[0].param_groups
        seen.append((one.batches.before(step), group["lr"]))

    whole = trainer(500, tmp_path / "whole", growth=growth, optim=optim)
    whole.callbacks = [look]
    model = whole.fit()
    totals = [0, *(total for total, _ in seen)]
    # The first step that reaches them is the last.
    assert totals[-2] < 200 <= totals[-1]
    assert totals[2] - totals[1] < totals[-1] - totals[-2]
    for before, (_, rate) in zip(totals, seen):
        assert rate == pytest.approx(0.01 * (1 - before / 200))
    # What is at its end stays there, and what was cut off ends at the same place.
    again = trainer(500, tmp_path / "whole", growth=growth, optim=optim).fit(resume=True)
    assert torch.equal(weights(again), weights(model))
    cut = trainer(500, tmp_path / "cut", growth=growth, optim=optim)
    cut.callbacks = [lambda one, step: one.finish_early() if step == 3 else None]
    cut.fit()
    resumed = trainer(500, tmp_path / "cut", growth=growth, optim=optim).fit(resume=True)
    assert torch.equal(weights(resumed), weights(model))


def test_steps_still_end_a_training_of_many_samples():
    found = trainer(3, growth=replace(GROWTH, samples=10_000))
    found.fit()
    assert found.step == 3


def test_samples_are_for_batches_that_grow():
    with pytest.raises(ValueError, match="add --batch-size auto"):
        TrainerSettings(growth=GrowthSettings(samples=100))
    with pytest.raises(ValueError, match="samples must be > 0"):
        GrowthSettings(samples=0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("first, micro, parts", [(8, 3, 2), (14, 16, 4), (34, 5, 2)])
def test_parts_of_all_processes_are_the_batch(processes, first, micro, parts):
    growth = GrowthSettings(first=first, largest=64, micro=micro, parts=parts)
    rows = []
    for process in range(processes):
        batches = Batches("auto", 1, growth, process=process, processes=processes)
        assert batches.kind == "auto"
        for tested in (True, False):
            cuts = batches.begin(make_model().parameters())
            assert all(0 < cut.stop - cut.start <= micro for cut in cuts)
            if tested:
                assert len(cuts) * processes >= parts
            batches.controller.step = 1
        rows += itertools.chain(*(range(cut.start, cut.stop) for cut in cuts))
    assert rows == list(range(batches.plan.size))
    assert first <= batches.plan.size


@pytest.mark.parametrize(
    "processes, growth",
    [
        (8, GrowthSettings()),
        (8, GrowthSettings(first=2)),
        (2, GrowthSettings(parts=2)),
        (2, GrowthSettings(first=2)),
        (3, GrowthSettings(first=9, micro=4, parts=4)),
    ],
)
def test_every_process_sees_a_part(processes, growth):
    """The last pass of several shows their mean, and the noise is between the others."""
    method, seen = FlowMatching(make_model(), Independent(DATA)), 0
    for process in range(processes):
        batches = Batches("auto", 1, growth, process=process, processes=processes)
        assert batches.controller.due
        assert growth.first <= batches.plan.size
        method.model.zero_grad()
        cuts = batches.begin(method.model.parameters())
        for number, rows in enumerate(cuts):
            method.loss(Draw.of(batches.plan.size, part=rows)).backward()
            batches.observe(rows, last=number + 1 == len(cuts))
        found = batches._watch.statistics()
        seen += found.count
    assert seen >= min(growth.parts, batches.plan.size // 2)


def test_batches_that_cannot_be_tested_stay():
    growth = GrowthSettings(first=2, largest=7)
    batches = Batches("auto", 1, growth, processes=4)
    assert not batches.controller.due
    assert batches.begin(make_model().parameters()) == [slice(0, 1)]
    batches.test()


def test_every_sample_comes_once_an_epoch_while_batches_grow(tmp_path):
    seen = []

    class Watched(TensorData):
        def batch(self, indices):
            seen.extend(indices.tolist())
            return super().batch(indices)

    watched = trainer(8, tmp_path, data=Watched(DATA))
    watched.fit()
    sizes = [row["batch_size"] for row in read_log(tmp_path / "metrics.jsonl")]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 48
    assert len(seen) == watched.batches.before(8) > 200
    for start in (0, 100):
        assert sorted(seen[start : start + 100]) == list(range(100))


def test_rates_follow_batches():
    found = trainer(
        7, growth=replace(GROWTH, eta=0.01, lr_scaling="sqrt"), optim=OptimizerSettings("sgd")
    )
    found.fit()
    assert found.batches.plan.size == 48
    rate = found._optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 * 6**0.5)


# Life


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_grown_batches_resume_bit_for_bit(tmp_path, stop):
    expected = trainer(8, tmp_path / "whole").fit()
    trainer(stop, tmp_path / "cut").fit()
    resumed = trainer(8, tmp_path / "cut")
    model = resumed.fit(resume=True)
    assert torch.equal(weights(model), weights(expected))
    records = resumed.batches.controller.records
    assert [r.step for r in records] == [0, 2, 4, 6][: len(records)]
    assert resumed.batches.plan.size == 48
    with pytest.raises(ValueError, match="over all processes is auto, now 8"):
        trainer(9, tmp_path / "cut", batch_size=8, growth=GrowthSettings()).fit(resume=True)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="plans accumulation itself"):
        TrainerSettings(batch_size="auto", accumulate=2)
    with pytest.raises(ValueError, match="add --batch-size auto"):
        TrainerSettings(growth=GROWTH)
    with pytest.raises(ValueError, match="parts must be >= 2, got 1"):
        GrowthSettings(parts=1)
    with pytest.raises(ValueError, match="b_max must be at least the first batch, 32"):
        GrowthSettings(largest=16)
    with pytest.raises(ValueError, match="micro must be > 0"):
        GrowthSettings(micro=0)
    state = Batches("auto", 1, GROWTH, processes=2).state_dict()
    with pytest.raises(ValueError, match="grew on 2 processes, and now there are 1"):
        Batches("auto", 1, GROWTH).load_state_dict(state)

    class Two:
        model = make_model()

        def phases(self):
            return [Phase(name, self.model, lambda draw: torch.zeros(())) for name in "ab"]

    with pytest.raises(ValueError, match="watches one loss, not 2"):
        Trainer(Two(), TrainerSettings(batch_size="auto"))
