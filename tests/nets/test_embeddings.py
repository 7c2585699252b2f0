from __future__ import annotations

import math

import pytest
import torch

from rectiflow.flows import FlowModel, integrate
from rectiflow.nets import LabelEmbedding, TimeEmbedding, build


def test_time_features_equal_the_closed_form():
    width = 8
    t = [0.0, 0.1, 0.5, 1.0]
    phases = [[1000 * s * 10000 ** (-k / 3) for k in range(4)] for s in t]
    expected = [[math.sin(p) for p in row] + [math.cos(p) for p in row] for row in phases]
    got = TimeEmbedding(width).double()(torch.tensor(t, dtype=torch.float64))
    # float64 phases up to 1000 carry about 1e-13.
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-11, rtol=0)
    single = TimeEmbedding(width)(torch.tensor(t))
    # float32 phases up to 1000 carry about 1e-4 (t itself is rounded to 6e-8).
    torch.testing.assert_close(single.double(), got, atol=3e-4, rtol=0)


def test_a_cast_to_half_precision_keeps_the_frequencies():
    t = torch.tensor([0.25, 0.5, 0.75])  # exact in bfloat16
    exact = TimeEmbedding(16)(t)
    half = TimeEmbedding(16).to(torch.bfloat16)(t.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    # Only the features are rounded, to 2^-9 of 1.
    torch.testing.assert_close(half.float(), exact, atol=2**-8, rtol=0)


@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_half_precision_networks_are_sampled(name):
    small = {"mlp": {"depth": 1}, "unet": {"multipliers": (1,), "blocks": 1, "attention": ()}}
    net = build(name, shape=(1, 8, 8), width=8, classes=3, **small[name]).to(torch.bfloat16)
    x = torch.randn(2, 1, 8, 8, dtype=torch.bfloat16)
    # Solvers keep times in float32.
    found = integrate(FlowModel(net), x, 2, label=torch.tensor([0, 3]))
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_frequencies_come_back_after_the_meta_device():
    with torch.device("meta"):
        embed = TimeEmbedding(8)
    embed.to_empty(device="cpu")
    t = torch.rand(3)
    assert torch.equal(embed(t), TimeEmbedding(8)(t))
    assert embed.state_dict() == {}


@pytest.mark.parametrize("width", [0, 2, 7])
def test_time_width_is_checked(width):
    with pytest.raises(ValueError, match=f"even and >= 4, got {width}"):
        TimeEmbedding(width)


def test_no_label_is_the_null_vector():
    embed = LabelEmbedding(3, 5)
    assert torch.equal(embed(None), embed(torch.tensor([3]))[0])
    assert not torch.equal(embed(torch.tensor([0]))[0], embed(None))
    with pytest.raises(ValueError, match="classes must be > 0"):
        LabelEmbedding(0, 5)
