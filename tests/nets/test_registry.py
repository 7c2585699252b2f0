from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rectiflow import nets
from rectiflow.nets import registry


@pytest.mark.parametrize("name", sorted(nets.sizes))
def test_sizes_have_the_stated_parameters(name):
    size = nets.sizes[name]
    with torch.device("meta"):
        net = nets.build(name, shape=size.shape)
    assert sum(p.numel() for p in net.parameters()) == size.parameters
    assert net.name == size.net


def test_a_size_can_be_overridden():
    net = nets.build("unet-xs", shape=(3, 16, 16), dropout=0.3, classes=4)
    assert net.config["dropout"] == 0.3
    assert net.config["width"] == nets.sizes["unet-xs"].config["width"]
    assert net.classes == 4


def test_names():
    assert {"mlp", "unet", "unet-xs", "unet-s", "unet-cifar10", "unet-256"} <= set(nets.names())
    assert nets.names() == sorted(nets.names())


def test_unknown_names_and_arguments():
    with pytest.raises(ValueError, match="unknown net 'unet-cifar': did you mean 'unet-cifar10'"):
        nets.build("unet-cifar")
    with pytest.raises(ValueError, match="net 'mlp' has no 'widht': it takes shape, width, depth"):
        nets.build("mlp", shape=(2,), widht=3)
    with pytest.raises(ValueError, match="net 'unet-xs' has no 'depth': it takes shape, width"):
        nets.build("unet-xs", shape=(1, 28, 28), depth=3)
    with pytest.raises(ValueError, match="net 'unet-xs' needs 'shape'"):
        nets.build("unet-xs")


def test_users_can_register(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})

    class Line(torch.nn.Module):
        name = "line"

        def __init__(self, *, slope: float = 1.0) -> None:
            super().__init__()
            self.config = {"slope": slope}

    nets.register("line", Line)
    assert "line" in nets.names()
    assert nets.build("line", slope=2.0).config == {"slope": 2.0}
    with pytest.raises(ValueError, match="net 'line' has no 'curve': it takes slope"):
        nets.build("line", curve=1)
    with pytest.raises(ValueError, match="a net named 'line' exists"):
        nets.register("line", Line)
    with pytest.raises(ValueError, match="a net named 'unet-s' exists"):
        nets.register("unet-s", Line)
    nets.register("line", lambda **config: Line(slope=config["slope"] + 1), replace=True)
    assert nets.build("line", slope=3.0, anything=1).config == {"slope": 4.0}


def test_listing_names_loads_no_torch():
    code = (
        "import sys; from rectiflow.nets import names; names(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
