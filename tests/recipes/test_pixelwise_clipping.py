from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes.pixelwise_clipping import (
    ARMS,
    CALM,
    PIXEL,
    PRESETS,
    STRESSED,
    _checks,
    _spaced,
)
from rectiflow.recipes.texture_lab import Arm, Lab, Painted, paint


def painted(*values: float) -> list[Painted]:
    return [Painted(torch.zeros(3, 1, 1), value, 1.0, (1.0,), 0.0, 0.0) for value in values]


def states(whole: float, calm: float) -> list[str]:
    stressed = {
        PIXEL: painted(18, 19),
        "no bound": painted(12, 13),
        "whole gradient": painted(whole, 16),
    }
    return [
        check.state
        for check in _checks(
            {STRESSED: stressed, CALM: {PIXEL: painted(19, 19), "no bound": painted(calm, calm)}}
        )
    ]


def test_checks_are_the_specifications_rules() -> None:
    assert states(16, 19.5) == ["pass"] * 3
    assert states(17.5, 20.5) == ["pass", "weak", "fail"]
    # A bound on the whole gradient that is better on average: the pixels were of no use.
    assert states(22, 19) == ["pass", "fail", "pass"]
    # As good on average.
    assert states(21, 19) == ["pass", "fail", "pass"]


def test_preset_is_the_specifications() -> None:
    settings = PRESETS["default"]
    assert (settings.side, settings.views, settings.steps, settings.noise) == (64, 8, 400, 0.3)
    assert (settings.share, settings.gain, len(settings.factors)) == (0.01, 50, 4)
    assert len(settings.seeds) >= 3
    assert min(settings.tuning_seeds) >= 100
    assert _spaced(0.001, 1.0, 4) == pytest.approx([0.001, 0.01, 0.1, 1.0])


def test_linear_encoder_without_noise_is_gradient_descent_toward_the_target() -> None:
    target = torch.rand(1, 3, 8, 8) - 0.5
    lab = Lab(torch.nn.Identity(), target, 8, 4, 0.0, 0.05, 400.0, 60)
    still = paint(lab, Arm(), rate=0.05, factor=1.0, stressed=False, seed=0)
    assert still.psnr > 20
    assert still.largest[-1] < still.largest[0]
    # The same spikes: without a bound they shake the texture, pixel by pixel bounded they do not.
    wild = paint(lab, Arm(), rate=0.05, factor=1.0, stressed=True, seed=0)
    held = paint(lab, Arm("pixel"), rate=0.05, factor=2.0, stressed=True, seed=0)
    assert held.psnr > wild.psnr + 3
    assert wild.largest[0] > 10 * still.largest[0]
    assert 0 < held.clipped < 0.5
    assert held.turned == pytest.approx(0, abs=0.1)
    assert paint(lab, Arm("value"), rate=0.05, factor=2.0, stressed=True, seed=0).turned > 1


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    run = run_quick("pixelwise-clipping", tmp_path)
    assert run.arms == set(ARMS)
    assert len(run.table["checks"]) == 3
    # What is not judged without spikes is not tuned there.
    chosen = dict(note.split(": rate ") for note in run.table["notes"] if ": rate " in note)
    assert len(chosen) == 2 * len(ARMS)
    for arm in ("each number", "whole gradient", "each latent"):
        assert chosen[f"{CALM}, {arm}"] == chosen[f"{STRESSED}, {arm}"]
    bounded = run.values[f"{STRESSED}: share of pixels or latents bounded", "no bound"]
    assert bounded == [0.0]
    assert run.pictures == 2
