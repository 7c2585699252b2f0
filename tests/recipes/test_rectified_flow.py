from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.flows import RectifiedPath
from rectiflow.recipes import rectified_flow
from rectiflow.recipes.planar_flows import PATHS, PlanarScores, PlanarSettings, ring
from rectiflow.recipes.rectified_flow import FLOWS, STUDENTS, Scored, Settings, _checks
from rectiflow.recipes.tools import new_net


def scored(one: float, many: float, straight: float, cost: float) -> Scored:
    return Scored({1: one, 2: one, 4: many, 100: many}, straight, cost, [])


def states(*, straight: float, one: float, many: float = 1.0, cost: float = 9.9, vp: float = 1.0):
    """States of the checks when the first flow has S = 8, one-step distance 9, cost 10."""
    models = {
        FLOWS[0]: [scored(9.0, 1.0, 8.0, 10.0)],
        FLOWS[1]: [scored(one, many, straight, cost)],
        **{name: [scored(1.0, 1.0, 0.0, 10.0)] for name in STUDENTS},
    }

    def planar(s: float, e: float) -> PlanarScores:
        return PlanarScores(s, 10.0, e, 0.01, 0.05, [])

    plane = {
        "straight": [(planar(3.0, 2.7), planar(0.03, 0.02))],
        "VP": [(planar(3.0, 2.7), planar(3.0 / vp, 2.0))],
    }
    return [c.state for c in _checks(models, plane, Settings(), independent=20.0, distance="fd")]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert set(states(straight=1.0, one=1.0)) == {"pass"}
    assert states(straight=3.0, one=1.0)[0] == "weak"
    assert states(straight=5.0, one=1.0)[0] == "fail"
    assert states(straight=1.0, one=4.0)[1] == "weak"
    # 7.5 is within a fifth of 9.
    assert states(straight=1.0, one=7.5)[1] == "fail"
    assert states(straight=1.0, one=1.0, cost=10.3)[3] == "fail"
    assert states(straight=1.0, one=1.0, many=1.6)[4] == "fail"
    assert states(straight=1.0, one=1.0, vp=6.0)[7] == "fail"
    assert states(straight=math.nan, one=1.0)[0] == "fail"


def test_ring_has_eight_centres_of_the_given_spread() -> None:
    points = ring(8000, radius=4.0, std=0.15, generator=torch.Generator().manual_seed(0))
    turn = torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)
    # Three standard errors of a count of 1000.
    assert (torch.bincount(turn.round().long() % 8, minlength=8) - 1000).abs().max() < 90
    centre = turn.round() * (math.pi / 4)
    rest = points - 4 * torch.stack([centre.cos(), centre.sin()], 1)
    assert rest.std().item() == pytest.approx(0.15, rel=0.03)


def test_default_network_has_the_size_that_is_claimed() -> None:
    settings = Settings()
    net = new_net(settings.net, seed=0, shape=(1, 8, 8), **settings.net_options)
    assert sum(p.numel() for p in net.parameters()) == 54_752


def test_default_and_paper_follow_the_specification() -> None:
    default, paper = (rectified_flow.PRESETS[name] for name in ("default", "paper"))
    assert (default.chain.flow.steps, default.chain.reflow.steps) == (2500, 2500)
    assert (default.chain.distil.steps, default.chain.pairs.count) == (1500, 8000)
    assert (paper.data, paper.chain.flow.steps) == ("hub:cifar10", 1_300_000)
    assert (paper.chain.pairs.count, paper.chain.flow.ema) == (1_000_000, 0.999999)
    assert PlanarSettings().seeds == (0, 1)
    assert PATHS["straight"] == RectifiedPath()


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("rectified-flow", tmp_path)
    assert len(found.table["checks"]) == 8
    assert {*FLOWS, *STUDENTS, "independent pairs", "floor: train vs. test"} <= found.arms
    assert found.pictures == 4
    assert (found.run.path("seed-0") / "one-step" / "model" / "config.json").is_file()
