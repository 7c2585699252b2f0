from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.flows import FlowModel
from rectiflow.recipes import sd3_mmdit
from rectiflow.recipes.joint_attention import Judge, Logits, measured
from rectiflow.recipes.resolution_curves import Curves, distance, enlarge
from rectiflow.recipes.sd3_mmdit import NORM, PLAIN, TIMES, WITH, WITHOUT, Found, _checks
from rectiflow.recipes.time_samplers import (
    BEST,
    SAMPLERS,
    UNIFORM,
    mean_ranks,
    middle_over_ends,
    mixture_velocity,
)
from rectiflow.recipes.tools import new_net
from rectiflow.training.data import load


def states(**changes) -> list[str]:
    """States of the checks when everything holds, but for the changes."""
    given = {"best": 1.0, "uniform": 2.0, "middle": 3.0, "fall": 4.0, "with": 0.9, "without": 0.1}
    given |= {"norm": 10.0, "plain": 100.0, **changes}
    others = {name: [{5: 3.0 + i}] for i, name in enumerate(SAMPLERS)}
    distances = {**others, BEST: [{5: given["best"]}], UNIFORM: [{5: given["uniform"]}]}
    curve = [1.0, 2.0]
    away = [v * math.exp(given["fall"]) for v in curve]
    near = [v * math.e for v in curve]
    found = Found(
        distances=distances,
        errors=[[1.0] * 10 + [given["middle"]] + [1.0] * 10],
        curves=[{1: Curves(curve, curve), 2: Curves(away, near)}],
        obeyed={WITH: [given["with"]], WITHOUT: [given["without"]]},
        logits={NORM: [Logits(given["norm"], 10.0)], PLAIN: [Logits(given["plain"], math.inf)]},
        sheet=torch.zeros(1),
    )
    return [check.state for check in _checks(found)]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert states() == ["pass"] * 8
    # Behind uniform times, but not last.
    assert states(best=2.5)[:2] == ["weak", "pass"]
    assert states(best=100.0)[:2] == ["weak", "fail"]
    assert states(middle=1.2)[2] == "weak"
    assert states(middle=0.9)[2] == "fail"
    assert states(fall=2.0)[3] == "weak"
    assert states(fall=1.0)[3] == "fail"
    assert states(**{"with": 0.8})[4] == "fail"
    assert states(without=0.6)[5] == "fail"
    assert states(norm=11.0)[6] == "fail"
    assert states(plain=20.0)[7] == "weak"
    assert states(plain=5.0)[7] == "fail"
    assert states(plain=math.inf)[7] == "pass", "a training that diverged has grown"


def test_ranks_share_ties() -> None:
    found = mean_ranks(
        {"a": [{5: 1.0, 50: 1.0}], "b": [{5: 1.0, 50: 2.0}], "c": [{5: 9.0, 50: 3.0}]}
    )
    assert found == {"a": 1.25, "b": 1.75, "c": 3.0}


def test_the_mixture_velocity_is_the_mean_velocity_of_pairs() -> None:
    """Against a Monte Carlo regression: the mean of data - noise over pairs near a point."""
    generator = torch.Generator().manual_seed(0)
    centres, std, time = torch.tensor([[-1.0], [2.0]]), 0.5, 0.4
    rows = torch.randint(2, (2_000_000,), generator=generator)
    data = centres[rows] + std * torch.randn(len(rows), 1, generator=generator)
    noise = torch.randn(data.shape, generator=generator)
    x = time * data + (1 - time) * noise
    for point in (-0.5, 0.3, 1.0):
        near = (x - point).abs()[:, 0] < 0.02
        wanted = float((data - noise)[near].mean())
        t = torch.full((1,), time)
        found = float(mixture_velocity(torch.tensor([[point]]), t, centres, std))
        assert found == pytest.approx(wanted, abs=0.03)  # four standard errors


def test_enlarged_images_have_the_noise_level_of_the_shift() -> None:
    """Block means of a state at the shifted time are a scaled state of the small image."""
    from rectiflow.flows import shift_times

    factor, t = 4, 0.3
    shifted = shift_times(t, float(factor))
    # Means of factor² noises have deviation 1 / factor: the ratio data to noise must agree.
    assert shifted / ((1 - shifted) / factor) == pytest.approx(t / (1 - t))
    large = enlarge(torch.tensor([[[[1.0, 2.0]]]]), 2)
    assert large.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]
    assert distance([1.0, math.e], [1.0, 1.0]) == pytest.approx(0.5)
    assert middle_over_ends(TIMES, [2.0] + [0.0] * 9 + [3.0] + [0.0] * 9 + [1.0]) == 1.5


def test_the_judge_knows_digits_and_noise() -> None:
    train, test = load("digits", split="train"), load("digits", split="test")
    judge, rows = Judge(train), torch.arange(len(test))
    label = test.condition(rows)["label"]
    assert judge.accuracy(test.batch(rows), label) > 0.97
    assert judge.accuracy(test.batch(rows), (label + 1) % 10) < 0.03


def test_logits_are_measured_over_both_streams() -> None:
    options = {"shape": (1, 8, 8), "depth": 2, "heads": 2, "head_dim": 8, "classes": 3}
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    label = torch.tensor([0, 1, 2])
    normed = FlowModel(new_net("mmdit", seed=0, qk_norm="rms", **options))
    found = measured(normed, x, t, label=label)
    assert found.bound == 8.0
    # Cauchy-Schwarz: equality where a query meets a parallel key, and never beyond.
    assert 2 < found.largest <= 8.0 + 1e-4
    with torch.no_grad():
        normed.net.blocks[1].context.attention.key_norm[3] = -5.0
    assert measured(normed, x, t, label=label).bound == 40.0
    plain = FlowModel(new_net("mmdit", seed=0, **options))
    assert measured(plain, x, t, label=label).bound == math.inf


def test_default_follows_the_specification() -> None:
    default = sd3_mmdit.PRESETS["default"]
    assert default.ablation.steps == (5, 50)
    assert default.ablation.seeds == (0, 1, 2, 3, 4)
    assert (default.ablation.training.steps, default.ablation.training.batch_size) == (3000, 128)
    assert default.shift.factors == (2, 4)
    assert default.logits.factor == 8
    assert default.logits.training.precision == "bf16"


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("sd3-mmdit", tmp_path)
    assert found.run.record["systems"][0] == "sd3-mmdit"
    assert len(found.table["checks"]) == 8
    assert found.pictures == 4
