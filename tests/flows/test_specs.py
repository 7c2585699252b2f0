"""Words that stand for time samplers and premetrics."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from rectiflow import flows
from rectiflow.flows import L2, Discrete, PseudoHuber, Uniform, specs
from rectiflow.flows.specs import names, parse_premetric, parse_times


@pytest.mark.parametrize(
    "text, made",
    [
        ("uniform", Uniform()),
        ("uniform:0.25", Uniform(0.25)),
        ("uniform:0.25:0.5", Uniform(0.25, 0.5)),
        ("discrete:0:0.5", Discrete((0.0, 0.5))),
    ],
)
def test_times(text, made):
    assert parse_times(text) == made


def test_premetrics():
    assert parse_premetric("l2") == L2()
    assert parse_premetric("pseudo-huber") == PseudoHuber()
    assert parse_premetric("pseudo-huber:0.1") == PseudoHuber(0.1)


def test_a_word_may_name_any_class_of_the_flows(monkeypatch):
    @dataclass(frozen=True)
    class Ramp(Uniform):
        pass

    monkeypatch.setitem(specs.TIMES, "ramp", specs.Spec("Ramp", "low:high"))
    assert "ramp" not in names(specs.TIMES)
    with pytest.raises(ValueError, match="unknown time sampler 'ramp'"):
        parse_times("ramp")
    monkeypatch.setattr(flows, "Ramp", Ramp, raising=False)
    assert parse_times("ramp:0.5") == Ramp(0.5)


def test_every_word_makes_something():
    for name in names(specs.TIMES):
        sampler = parse_times("discrete:0" if name == "discrete" else name)
        assert sampler.sample(5).shape == (5,)
    for name in names(specs.PREMETRICS):
        assert callable(parse_premetric(name))


@pytest.mark.parametrize(
    "text, message",
    [
        ("unifrom", "unknown time sampler 'unifrom': did you mean 'uniform'"),
        ("uniform:a", "'uniform:a' is not understood: it takes uniform:low:high"),
        ("uniform:0:1:2", "'uniform:0:1:2' has too many numbers: it takes uniform:low:high"),
        ("uniform:0.5:0.5", "times need 0 <= low < high <= 1"),
        ("discrete", "times must be a non-empty list"),
    ],
)
def test_wrong_words(text, message):
    with pytest.raises(ValueError, match=message):
        parse_times(text)


def test_numbers_for_a_word_without_any():
    with pytest.raises(ValueError, match="has too many numbers: it takes l2 alone"):
        parse_premetric("l2:3")
