from __future__ import annotations

import json

import torch

from rectiflow.cli import main
from rectiflow.recipes.flowchef import CHEF, EXACT, PLAIN, SECOND, TASKS, Restored, Scored, checks
from rectiflow.training.peak_memory import PeakMemory


def restored(psnr=15.0, residual=0.001, seconds=1.0, memory=100) -> Restored:
    return Restored(psnr, residual, seconds, memory, torch.zeros(1), 0.1)


def seed(gain=6.0, behind=0.5, time=1.2, memory=100, residual=0.001) -> Scored:
    arms = {
        PLAIN: restored(9.0),
        CHEF: restored(9.0 + gain, residual, time, memory),
        EXACT: restored(9.0 + gain + behind, seconds=4.0, memory=200),
        SECOND: restored(14.0),
    }
    return Scored(dict.fromkeys(TASKS, arms), (0.3, 0.1))


def states(*seeds: Scored) -> list[str]:
    found = [check.state for check in checks(seeds)]
    assert found[:5] == found[5:]
    return found[:5]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert states(seed()) == ["pass"] * 5
    assert states(seed(gain=4.9))[0] == "weak"
    assert states(seed(gain=2.9))[0] == "fail"
    assert states(seed(behind=1.1))[1] == "weak"
    assert states(seed(behind=2.1))[1] == "fail"
    # Of the four seconds one is the repeated call: 1.35 / 3 is the bound.
    assert states(seed(time=1.34))[2] == "pass"
    assert states(seed(time=1.36))[2] == "fail"
    assert states(seed(memory=121))[3] == "fail"
    assert states(seed(residual=0.02))[4] == "fail"


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    weight = torch.randn(100, 100, requires_grad=True)
    with PeakMemory() as peak:
        x = torch.ones(250)
        for _ in range(5):
            x = x + 1
    assert peak.bytes == 2000
    with PeakMemory() as kept:
        y = torch.ones(100)
        for _ in range(4):
            y = torch.tanh(weight @ y)
    with PeakMemory() as dropped, torch.no_grad():
        y = torch.ones(100)
        for _ in range(4):
            y = torch.tanh(weight @ y)
    assert dropped.bytes <= 1200 < 2000 <= kept.bytes


def test_quick_preset(tmp_path) -> None:
    out = tmp_path / "run"
    assert main(["run", "flowchef", "--preset", "quick", "--out", str(out)]) in (0, 1)
    result = json.loads((out / "result.json").read_text())
    assert len(result["checks"]) == 10
    found = {(n["quantity"], n["arm"]): n["mean"] for n in result["numbers"]}
    for task in TASKS:
        assert found[f"{task}: PSNR, dB", CHEF] > found[f"{task}: PSNR, dB", PLAIN] + 1
        memory = f"{task}: peak memory of tensors, MB"
        assert found[memory, CHEF] < found[memory, EXACT]
    assert (out / "inpaint.png").is_file()
    assert (out / "enlarge.png").is_file()
