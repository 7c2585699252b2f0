"""The chain in one call: what it leaves, and that an earlier one does not show through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rectiflow.distill import chain
from rectiflow.distill.chain import ChainSettings, Stage, TeacherSettings, make_one_step
from rectiflow.flows.artifact import identity
from rectiflow.training import TrainerSettings
from rectiflow.training.data import load

SHORT = TrainerSettings(steps=3, batch_size=8)
TEACHER = TeacherSettings(count=16, steps=4, straight_steps=2)
SETTINGS = ChainSettings("mlp-2d", SHORT, TEACHER, SHORT, SHORT)


def made(stages: list[Stage]) -> list[str | None]:
    return [identity(stage.model) for stage in stages]


@pytest.mark.filterwarnings("ignore:the pairs")
def test_an_overwritten_chain_goes_on_as_itself(tmp_path, monkeypatch):
    data, other = load("digits"), replace(SETTINGS, seed=1)
    expected = make_one_step(data, other, tmp_path / "whole")
    assert [stage.key for stage in expected] == ["flow", "reflow-1", "one-step"]
    first = make_one_step(data, SETTINGS, tmp_path / "run")
    real = chain._pairs

    def pull(model, folder, *rest):
        raise RuntimeError("pulled the plug")

    monkeypatch.setattr(chain, "_pairs", pull)
    with pytest.raises(RuntimeError, match="plug"):
        make_one_step(data, other, tmp_path / "run")
    monkeypatch.setattr(chain, "_pairs", real)
    resumed = make_one_step(data, other, tmp_path / "run", resume=True)
    assert made(resumed) == made(expected)
    assert not set(made(resumed)) & set(made(first))
    again = make_one_step(data, SETTINGS, tmp_path / "run")
    assert made(again) == made(first)
    assert all(torch.isfinite(p).all() for p in again[-1].model.parameters())
