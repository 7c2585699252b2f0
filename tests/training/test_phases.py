"""Phases that start late: their pace, their learning rate, their checkpoints, the average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rectiflow.flows import FlowModel
from rectiflow.flows.couplings import Draw
from rectiflow.nets import MLP
from rectiflow.training import OptimizerSettings, Phase, Trainer, TrainerSettings


class Late:
    """A model that is trained from a step on, beside a companion that learns all the time."""

    def __init__(self, first: int, every: int = 1) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = FlowModel(MLP(shape=(2,), width=8, depth=1, zero=False), shape=(2,))
            self.other = nn.Linear(2, 1)
        self.first, self.every = first, every
        self.calls: list[tuple[str, int]] = []

    def phases(self) -> list[Phase]:
        wrapped = nn.ModuleDict({"model": self.model})
        optimizer = OptimizerSettings(learning_rate=1e-2, schedule="linear", warmup=2)
        return [
            Phase("late", wrapped, self._late, self.every, optimizer, first=self.first),
            Phase("other", self.other, self._other),
        ]

    def _late(self, draw: Draw) -> torch.Tensor:
        self.calls.append(("late", draw.step))
        return self.model(draw.normal((2,)), draw.uniform()).square().mean()

    def _other(self, draw: Draw) -> torch.Tensor:
        self.calls.append(("other", draw.step))
        return self.other(draw.normal((2,))).square().mean()


@pytest.mark.parametrize(
    "every, first, steps", [(1, 0, [0, 1, 2, 3, 4, 5, 6]), (3, 0, [0, 3, 6]), (3, 2, [2, 5])]
)
def test_phases_run_when_they_are_due(every, first, steps):
    method = Late(first, every)
    Trainer(method, TrainerSettings(steps=7, batch_size=4)).fit()
    assert [step for name, step in method.calls if name == "late"] == steps
    assert [step for name, step in method.calls if name == "other"] == list(range(7))


def test_rate_of_a_late_phase_starts_with_it():
    rates = []
    method = Late(first=4)
    settings = TrainerSettings(steps=10, batch_size=4)

    def note(trainer, step):
        rates.append(trainer._optimizers[0].param_groups[0]["lr"])

    Trainer(method, settings, callbacks=[note]).fit()
    # Two steps of warm-up and then a line from the peak toward zero, all from step 4 on.
    assert rates[4:] == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_average_counts_updates_of_the_model_only():
    method = Late(first=2, every=3)
    trainer = Trainer(method, TrainerSettings(steps=9, batch_size=4, ema=0.9))
    trainer.fit()
    assert trainer.ema.updates == 3


def test_checkpoint_before_a_phase_began_leaves_no_trace(tmp_path):
    def fit(folder, stop=None, resume=False):
        def pull(trainer, step):
            if step == stop:
                raise RuntimeError("plug")

        settings = TrainerSettings(steps=8, batch_size=4, checkpoint_every=1)
        trainer = Trainer(Late(first=4), settings, folder=folder, callbacks=[pull])
        return torch.cat([p.flatten() for p in trainer.fit(resume=resume).parameters()])

    whole = fit(None)
    assert torch.equal(fit(tmp_path / "a"), whole)
    with pytest.raises(RuntimeError, match="plug"):
        fit(tmp_path / "b", stop=3)
    assert torch.equal(fit(tmp_path / "b", resume=True), whole)
