from __future__ import annotations

import math
from pathlib import Path

from tests.recipes.quick import run_quick

from rectiflow.distill import Profile, Straightening
from rectiflow.distill.crossing import CrossingRisk
from rectiflow.recipes import rfpp
from rectiflow.recipes.diffusion_start import ARMS, Start
from rectiflow.recipes.rfpp_findings import (
    GRIDS,
    HUBER,
    LOGIT,
    PERCEPTUAL,
    SHAPED,
    UNIFORM,
    Scored,
    Seed,
    checks,
)


def seed(uniform=10.0, shaped=8.0, logit=24.0, after=(4.0, 1.0, 4.0), before=(1.0, 1.0, 1.0), at=2):
    distances = {UNIFORM: uniform, SHAPED: shaped, LOGIT: logit}

    def made(loss) -> Profile:
        return Profile((0.2, 0.5, 0.8), loss, (0.0,) * 3, 0.1, 0.1, 0.1, 10, 1)

    return Seed(
        teacher=1.0,
        arms={name: Scored(value, 1.0, 1.0, 1.0, 1.0, 0.1) for name, value in distances.items()},
        report=Straightening(made(before), made(after)),
        crossing=CrossingRisk(0.5, 1.0, 2.0, 0.0, 0.5, 0.0, 10),
        grids={},
        start=Start(
            (1, 2, 3, 4), {ARMS[0]: [9.0] * (at - 1) + [5.0] * 9, ARMS[1]: [9, 8, 7, 6]}, 1
        ),
    )


def states(*seeds: Seed) -> list[str]:
    return [check.state for check in checks(seeds, "fd")]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert states(seed()) == ["pass"] * 6
    # Rules on means: one bad seed does not count.
    assert states(seed(), seed(shaped=10.5), seed())[0] == "pass"
    assert states(seed(shaped=9.8))[0] == "weak"
    assert states(seed(shaped=10.1))[0] == "fail"
    assert states(seed(logit=9.0))[1:3] == ["fail", "weak"]
    assert states(seed(logit=7.0))[2] == "fail"
    assert states(seed(after=(4.0, 1.0, 1.9)))[3] == "fail"
    assert states(seed(before=(3.0, 1.0, 3.0)))[4] == "fail"
    assert states(seed(at=4))[5] == "weak"
    assert states(seed(at=5))[5] == "fail"
    assert states(seed(uniform=math.nan))[0] == "fail"


def test_share_is_where_the_diffusion_start_gets_as_good_as_the_other_ends() -> None:
    assert seed(at=1).start.share == 0.25
    assert seed(at=3).start.share == 0.75
    assert seed(at=9).start.share == 2.0


def test_default_and_paper_follow_the_specification() -> None:
    default, paper = (rfpp.PRESETS[name] for name in ("default", "paper"))
    assert (default.flow.steps, default.reflow.steps, default.pairs) == (2500, 1200, 8000)
    assert (default.a, default.seeds) == (4.0, (0, 1, 2))
    assert (paper.data, paper.reflow.steps, paper.pairs) == ("hub:cifar10", 800_000, 1_000_000)
    assert (paper.reflow.batch_size, paper.reflow.ema) == (512, 0.9999)
    assert paper.start.sigma_data == 0.5


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("rfpp", tmp_path)
    assert len(found.table["checks"]) == 6
    assert {UNIFORM, SHAPED, HUBER, PERCEPTUAL, LOGIT, "floor: train vs. test"} <= found.arms
    assert {*ARMS, *GRIDS} <= found.arms
    assert found.pictures == 3
