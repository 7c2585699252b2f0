"""Truncation rules: their distributions, their ends, their errors."""

from __future__ import annotations

import statistics

import pytest

from rectiflow.align import Fixed, LastK, Normal, Uniform, parse_truncation

GRID = [(i + 0.5) / 4000 for i in range(4000)]


def drawn(rule, steps: int) -> list[int]:
    return [rule.first(steps, u) for u in GRID]


def test_uniform_gives_every_number_of_steps_equally_often() -> None:
    counts = [20 - first for first in drawn(Uniform(), 20)]
    assert {counts.count(k) for k in range(1, 21)} == {200}
    some = [20 - first for first in drawn(Uniform(3, 6), 20)]
    assert {k: some.count(k) for k in set(some)} == dict.fromkeys((3, 4, 5, 6), 1000)


def test_normal_is_that_of_the_scripts() -> None:
    """Against drawing again until inside, which the official code does."""
    import random

    rng = random.Random(0)
    reference = []
    while len(reference) < 40_000:
        value = int(rng.gauss(42, 5))
        if 1 <= value <= 49:
            reference.append(value)
    ours = drawn(Normal(42, 5), 50)
    # Standard error of the reference's mean: 4.3 / 200.
    assert statistics.fmean(ours) == pytest.approx(statistics.fmean(reference), abs=0.08)
    assert statistics.stdev(ours) == pytest.approx(statistics.stdev(reference), abs=0.06)
    assert max(ours) == 49
    assert drawn(Normal(), 50) == ours


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("rule", [Fixed(), LastK(1), Uniform(), Normal()])
def test_some_step_always_carries_gradient(rule, steps: int) -> None:
    found = {rule.first(steps, u) for u in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)}
    assert all(0 <= first < steps for first in found)


def test_last_and_fixed_agree() -> None:
    assert LastK(20).first(20, 0.5) == Fixed(0).first(20, 0.1) == 0
    assert LastK(1).first(20, 0.9) == Fixed(19).first(20, 0.2) == 19


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Fixed(49).first(20, 0.0), "cannot begin at step 49 of 20: give 0 to 19"),
        (lambda: LastK(21).first(20, 0.0), "21 steps cannot carry gradient: the chain has 20"),
        (lambda: Uniform(1, 50).first(20, 0.0), "50 steps cannot carry"),
        (lambda: Normal(400, 5).first(20, 0.0), "within reach of a mean of 400"),
        (lambda: LastK(0), "count must be > 0"),
        (lambda: Fixed(-1), "start must be >= 0"),
        (lambda: Uniform(4, 2), "high must be >= low"),
        (lambda: Uniform(0), "low must be > 0"),
        (lambda: parse_truncation("unifrom"), "did you mean 'uniform'"),
        (lambda: parse_truncation("last:x"), "takes up to 1 number"),
        (lambda: parse_truncation("full:3"), "takes no number"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_words() -> None:
    words = {
        "full": Fixed(0), "fixed:3": Fixed(3), "last": LastK(1), "last:2": LastK(2),
        "uniform": Uniform(), "uniform:1:50": Uniform(1, 50), "normal": Normal(),
        "normal:42:5": Normal(42.0, 5.0),
    }  # fmt: skip
    assert {word: parse_truncation(word) for word in words} == words
