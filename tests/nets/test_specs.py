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


def test_one_number_or_none_where_several_go():
    net = build_spec("unet:width=8,multipliers=2,blocks=1,attention=4,dropout=0", shape=(1, 4, 4))
    assert (net.config["multipliers"], net.config["attention"]) == ([2], [4])
    net = build_spec("unet-xxs:width=8,attention=none", shape=(1, 28, 28))
    assert net.config["attention"] == []
    net = build_spec("mmdit:depth=2,head_dim=8,dual_layers=0,qk_norm=none", shape=(1, 4, 4))
    assert (net.config["dual_layers"], net.config["qk_norm"]) == ([0], None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mpl", "unknown net 'mpl': did you mean 'mlp'"),
        ("mlp:width", "needs arguments like width=48, got 'width'"),
        ("mlp:width=", "needs arguments like width=48, got 'width='"),
        ("mlp:breadth=3", "net 'mlp' has no 'breadth'"),
        ("mlp:shape=2", "'mlp:shape=2' takes shape from the data: leave shape out"),
        ("mlp:classes=3", "takes classes from the data: leave classes out"),
        ("mlp:activation=none", "unknown activation 'none'"),
    ],
)
def test_wrong_words(text, message):
    with pytest.raises(ValueError, match=message):
        build_spec(text, shape=(2,))
