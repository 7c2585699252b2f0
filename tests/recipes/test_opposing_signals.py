from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick
from torch import nn

from rectiflow.diagnose import SampleProbe
from rectiflow.recipes.character_lab import ADAM, SGD, SPLIT, Tuned
from rectiflow.recipes.opposing_images import (
    CLIPPED,
    RANDOM,
    SLOWER,
    UNCHANGED,
    WITHOUT,
    Found,
    ImageSettings,
    intervene,
    largest_rise,
    make_net,
)
from rectiflow.recipes.opposing_signals import Settings, _checks
from rectiflow.recipes.opposing_toy import ToyFound, spike_after_convergence

TOY = ToyFound({}, {}, {"two layers": 2.7, "no feature": 1e-7, "one layer": 1e-7}, 0.97, {}, 0.9999)


def row(**changed: float) -> dict[str, float]:
    plain = {
        "cos_pm": -0.8,
        "cos_rand": 0.1,
        "cos_labels": -0.3,
        "proj_plus": 0.9,
        "proj_minus": -0.9,
    }
    return {**plain, "eta_lambda": 2.2, "norm_ratio": 8.0, "share": 0.4, "swapped": 0.9, **changed}


def seed(**changed) -> Found:
    spikes = {UNCHANGED: 0.2, WITHOUT: 0.01, RANDOM: 0.19, CLIPPED: 0.01, SLOWER: 0.0}
    plain = Found([row()] * 5, [0.1, 0.2], [row()] * 9, None, spikes)
    return replace(plain, **changed)


def states(one: Found | None = None, toy: ToyFound = TOY, split: float = 2.2) -> list[str]:
    losses = {SGD: (2.3, 2.31), SPLIT: (split, split + 0.02), ADAM: (2.1, 2.1)}
    tuned = {name: Tuned(1.0, {1.0: 2.0}, values) for name, values in losses.items()}
    return [check.state for check in _checks(toy, [seed() if one is None else one], tuned)]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert set(states()) == {"pass"}
    assert states(toy=replace(TOY, spike={**TOY.spike, "two layers": 0.0}))[0] == "fail"
    assert states(toy=replace(TOY, spike={**TOY.spike, "no feature": 0.1}))[1] == "fail"
    # A control that never converged shows nothing.
    never = spike_after_convergence([1.0, 0.5])
    assert states(toy=replace(TOY, spike={**TOY.spike, "one layer": never}))[2] == "fail"
    assert states(toy=replace(TOY, settled=1.01))[3] == "fail"
    assert states(toy=replace(TOY, linear=0.9))[4] == "fail"
    assert states(seed(rises=[row(cos_pm=-0.5)] * 3))[5] == "fail"
    assert states(seed(rises=[row(cos_rand=-0.1)] * 3))[6] == "fail"
    assert states(seed(rises=[row(), row(proj_minus=0.2)]))[7] == "fail"
    assert states(seed(early=[-0.5]))[8] == "fail"
    spikes = seed().spikes
    assert states(seed(spikes={**spikes, WITHOUT: 0.14}))[9] == "weak"
    assert states(seed(spikes={**spikes, WITHOUT: 0.19}))[9] == "fail"
    assert states(seed(spikes={**spikes, CLIPPED: 0.19}))[10] == "fail"
    assert states(seed(spikes={**spikes, SLOWER: 0.19}))[11] == "fail"
    assert states(seed(spikes={**spikes, RANDOM: 0.05}))[12] == "fail"
    assert states(split=2.29)[13] == "weak"
    assert states(split=2.31)[13] == "fail"


def test_without_a_rise_nothing_passes() -> None:
    assert states(seed(rises=[], early=[], spikes={}))[5:13] == ["fail"] * 8
    assert math.isnan(seed(rises=[]).opposite)


def test_largest_rise_is_above_the_lowest_before() -> None:
    assert largest_rise([]) == 0
    assert largest_rise([2.0, 1.0]) == 0
    assert largest_rise([5.0, 1.0, 4.0, 0.0, 2.0]) == 3


def swinging() -> tuple[SampleProbe, float]:
    """A line fitted to points, two of which swing it: stable without them, unstable with them."""
    model = nn.Linear(1, 1, bias=False).double()
    inputs = torch.full((20, 1), 0.1, dtype=torch.float64)
    inputs[:2] = torch.tensor([[10.0], [-10.0]])
    targets = torch.zeros(20, dtype=torch.float64)
    probe = SampleProbe(model, inputs, targets, lambda out, y: (out[:, 0] - y).square() / 2)
    # The curvature is 10 with the two and 0.01 without.
    return probe, 0.25


def test_interventions_on_a_line() -> None:
    probe, rate = swinging()
    state = {"weight": torch.ones(1, 1, dtype=torch.float64)}
    found = intervene(probe, state, torch.tensor([0, 1]), rate=rate, steps=8)
    assert list(found) == [UNCHANGED, WITHOUT, RANDOM, CLIPPED, SLOWER]
    # The weight is multiplied by 1 - rate curvature: -1.5, and by -1.78 without random samples.
    unchanged = 0.005 * (1.5025**14 - 1)
    assert found[UNCHANGED] == pytest.approx(unchanged, rel=1e-2)
    assert found[RANDOM] == pytest.approx(0.005 * (1.7780**14 - 1), rel=2e-2)
    assert found[WITHOUT] == found[SLOWER] == found[CLIPPED] == 0


def test_settings_follow_the_specification() -> None:
    default = Settings().images
    net = make_net(196, 10, default, seed=0)
    assert sum(p.numel() for p in net.parameters()) == 196 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10
    assert (default.rate, default.steps, default.size) == (0.15, 1500, 20)
    again = make_net(196, 10, ImageSettings(), seed=0)
    assert torch.equal(net[0].weight, again[0].weight)


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("opposing-signals", tmp_path)
    assert len(found.table["checks"]) == 14
    assert {"two layers", "no feature", "one layer", "descent", SGD, SPLIT, ADAM} <= found.arms
    assert found.pictures >= 6
    lines = found.run.path("seed-0/diagnose/opposing-signals.jsonl").read_text().splitlines()
    assert len(lines) >= 4
