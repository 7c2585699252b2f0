"""The arithmetic and the refusals of the benchmark harness."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_harness", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ratio_is_the_median_of_ratios_within_rounds(harness: ModuleType) -> None:
    # A machine that slows threefold in one round slows both: medians of times would mislead.
    rounds = harness.Rounds(
        {"a": [(2.0, 4.0), (6.0, 12.0), (8.0, 1.0)], "b": [(1.0, 1.0), (3.0, 3.0), (2.0, 1.0)]}
    )
    assert rounds.ratio("a", "b").median == 2.0
    assert rounds.ratio("a", "b").high == 3.0
    assert rounds.ratio("a", "b", clock=1).median == 4.0
    assert rounds.over("a", "b").median == 3.0


def test_measure_refuses_when_the_floor_disagrees_with_itself(harness: ModuleType) -> None:
    calls = iter(range(1000))

    def unsteady() -> tuple[float, float]:
        # Twice per round, 1.2 times apart; the order within rounds alternates.
        index = next(calls)
        return (1.0, 1.0) if (index + index // 2) % 2 else (1.2, 1.2)

    with pytest.raises(harness.Unquiet, match=r"outside \[0.95, 1.05\] in 2 attempts"):
        harness.measure({"floor": unsteady}, floor="floor", rounds=5, attempts=2)


def test_measure_times_every_variant_once_in_each_round(harness: ModuleType) -> None:
    seen: list[str] = []

    def named(name: str, seconds: float) -> Callable[[], tuple[float, float]]:
        def timer() -> tuple[float, float]:
            seen.append(name)
            return seconds, seconds

        return timer

    timers = {"a": named("a", 1.0), "b": named("b", 3.0)}
    rounds = harness.measure(timers, floor="a", rounds=4)
    assert seen == ["a", "b", "a"] * 4
    assert rounds.ratio("b", "a").median == 3.0


def test_blocks_keep_garbage_collection_outside(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[bool] = []
    timer = harness.block(lambda: states.append(gc.isenabled()), shortest=0.0)
    states.clear()
    # Empty blocks say nothing: any ratio will do.
    monkeypatch.setattr(harness, "TRUSTED", (0.0, float("inf")))
    found = harness.measure({"a": timer}, floor="a", rounds=4)
    assert states == [False] * 8
    assert gc.isenabled()
    assert all(cpu >= 0 < wall for cpu, wall in found.seconds["a"])


@pytest.mark.parametrize(
    "value,bound,lower,met",
    [(0.8, 0.8, False, True), (0.9, 0.8, False, False), (0.9, 0.95, True, False)],
)
def test_targets_bound_from_the_right_side(
    harness: ModuleType, value: float, bound: float, lower: bool, met: bool
) -> None:
    figure = harness.Quartiles(value, value, value)
    row = harness.Row("case", "a / b", figure, figure, target=bound, lower_bound=lower)
    assert row.met is met


def test_a_miss_within_the_noise_is_unclear(harness: ModuleType) -> None:
    noisy = harness.Quartiles.of([0.95, 1.0, 1.02, 1.04, 1.09])
    exact = harness.Quartiles.of([1.02] * 5)
    assert noisy.median == exact.median == 1.02
    assert noisy.error == pytest.approx(0.929 * 0.04 / 5**0.5)
    row = harness.Row("case", "a / b", noisy, exact, target=1.0)
    assert row.met is False
    assert row.unclear
    assert not replace(row, clock="wall").unclear
    assert not replace(row, target=0.9).unclear
    assert not replace(row, target=1.1).unclear
    assert not replace(row, target=None).unclear


def test_median_errors_are_those_of_normal_noise(harness: ModuleType) -> None:
    draws = torch.randn(2000, 31, generator=torch.Generator().manual_seed(0))
    errors = [harness.Quartiles.of(row).error for row in draws.tolist()]
    medians = torch.median(draws, dim=1).values
    # The rule is that of many rounds; the quartiles of 31 are a twentieth too close.
    assert sum(errors) / len(errors) == pytest.approx(float(medians.std()), rel=0.08)


def test_peaks_are_those_of_the_child(harness: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def hold(mib): return b'x' * (mib << 20)\n")
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom beside import hold\nhold(int(sys.argv[1]))\n")
    few, many = (harness.peak_mib(str(script), mib) for mib in ("1", "65"))
    assert many - few == pytest.approx(64, abs=4)


def test_report_writes_the_machine_and_says_what_was_missed(
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    figure = harness.Quartiles(1.2, 1.1, 1.3)
    rows = [harness.Row("case", "a / b", figure, figure, target=1.0)]
    assert harness.report("name", "A question?", rows, packages=("torch", "no-such-thing")) is False
    record = json.loads((tmp_path / "name.json").read_text())
    assert record["rows"][0]["met"] is False
    assert record["rows"][0]["cpu"] == {"median": 1.2, "low": 1.1, "high": 1.3, "error": 0.0}
    assert record["machine"]["packages"]["no-such-thing"] is None
    assert {"cpu", "cores", "threads", "python", "date"} <= set(record["machine"])
    assert [f.name for f in tmp_path.iterdir()] == ["name.json"]
    assert "NO" in capsys.readouterr().out
