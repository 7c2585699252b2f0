"""`rectiflow demo`: what it refuses before it trains."""

from __future__ import annotations

import pytest

from rectiflow.cli import main


def test_samples_are_checked_at_once(tmp_path, capsys):
    assert main(["demo", "--samples", "0", "--out", str(tmp_path / "run")]) == 2
    assert "samples must be > 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_scored_is_not_trained(tmp_path, capsys, monkeypatch):
    def broken(*given, **options):
        raise ValueError("no features")

    def train(*given, **options):
        pytest.fail("trained before it was known whether the models can be scored")

    monkeypatch.setattr("rectiflow.training.evaluation.Evaluator", broken)
    monkeypatch.setattr("rectiflow.distill.chain.make_one_step", train)
    assert main(["demo", "--preset", "quick", "--out", str(tmp_path / "run")]) == 2
    assert "no features" in capsys.readouterr().err
