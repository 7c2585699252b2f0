"""Guidance from words: what they mean, and what is said about those that mean nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rectiflow.guidance import APG, ClassifierFreeGuidance, parse_guidance


@pytest.mark.parametrize(
    "text, kind, settings",
    [
        ("4", "cfg", {"scale": 4.0}),
        (4.0, "cfg", {"scale": 4.0}),
        ("cfg:4,start=.1,stop=.8", "cfg", {"scale": 4.0, "start": 0.1, "stop": 0.8}),
        ("cfg:2, negative=3", "cfg", {"scale": 2.0, "negative": {"label": 3}}),
        ("cfg:scale=4", "cfg", {"scale": 4.0}),
        ("cfg:7,rescale=0.7", "cfg", {"scale": 7.0, "rescale": 0.7}),
        (
            "apg:7.5,eta=0,momentum=-0.5,norm=15",
            "apg",
            {"scale": 7.5, "eta": 0.0, "momentum": -0.5, "norm": 15.0},
        ),
        ("apg:sdxl", "apg", {"scale": 15.0, "eta": 0.0, "norm": 15.0, "momentum": -0.5}),
        ("apg:sdxl,scale=9", "apg", {"scale": 9.0, "eta": 0.0, "norm": 15.0, "momentum": -0.5}),
    ],
)
def test_words_mean_settings(text, kind, settings) -> None:
    found = parse_guidance(text)
    assert (found.kind, found.settings) == (kind, settings)
    field = found.around(lambda x, t: x)
    assert type(field) is {"cfg": ClassifierFreeGuidance, "apg": APG}[kind]
    assert {name: getattr(field, name) for name in settings} == settings


@pytest.mark.parametrize(
    "text, message",
    [
        ("agp:4", "unknown guidance 'agp': did you mean 'apg'"),
        ("apg", "has no scale"),
        ("cfg:", "has no scale"),
        ("apg:4,momentun=0", "unknown setting of apg 'momentun': did you mean 'momentum'"),
        ("cfg:4,eta=0", "unknown setting of cfg 'eta'"),
        ("apg:sd-xl", "unknown preset of guidance 'sd-xl': did you mean 'sdxl'"),
        ("apg:4,eta", "is not understood: write 4, cfg:4"),
        ("cfg:four", "is not understood"),
        ("apg:4,eta=much", "eta in guidance 'apg:4,eta=much' must be a number, got 'much'"),
        ("apg:4,eta=0,eta=1", "gives eta twice"),
        ("apg:4,scale=5", "gives scale twice"),
        ("cfg:4,negative=-1", "must be a class label"),
        ("-2", "guidance must be >= 0"),
        ("cfg:nan", "guidance must be >= 0"),
        ("", "unknown guidance ''"),
    ],
)
def test_words_that_mean_nothing_are_refused_in_a_sentence(text, message) -> None:
    with pytest.raises(ValueError) as refused:
        parse_guidance(text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_settings_out_of_range_are_refused_when_the_field_is_made() -> None:
    with pytest.raises(ValueError, match="momentum must be in"):
        parse_guidance("apg:4,momentum=2").around(lambda x, t: x)


def test_words_need_no_torch() -> None:
    code = (
        "import sys; from rectiflow.guidance.specs import parse_guidance; parse_guidance('4'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
