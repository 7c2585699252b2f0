"""Networks from one word."""

from __future__ import annotations

import pytest

from rectiflow.nets import build_spec


def test_arguments_of_every_kind():
    net = build_spec(
        "unet:width=8,multipliers=1-2,blocks=1,attention=4-2,dropout=0.5", shape=(1, 4, 4)
    )
    expected = {"width": 8, "multipliers": [1, 2], "attention": [4, 2], "dropout": 0.5}
    assert {name: net.config[name] for name in expected} == expected
    net = build_spec("mlp:zero=false,activation=relu,width=8,depth=1", shape=(2,), classes=3)
    assert (net.config["zero"], net.config["activation"], net.classes) == (False, "relu", 3)


def test_sizes_and_plain_names():
    assert build_spec("mlp-2d", shape=(2,)).config["width"] == 64
    assert build_spec("mlp-2d:depth=1", shape=(2,)).config["depth"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("mpl", "unknown net 'mpl': did you mean 'mlp'"),
        ("mlp:width", "needs arguments like width=48, got 'width'"),
        ("mlp:width=", "needs arguments like width=48, got 'width='"),
        ("mlp:breadth=3", "net 'mlp' has no 'breadth'"),
    ],
)
def test_wrong_words(text, message):
    with pytest.raises(ValueError, match=message):
        build_spec(text, shape=(2,))
