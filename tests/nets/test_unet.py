from __future__ import annotations

import pytest
import torch
from tests.oracles.attention import self_attention_block

from rectiflow.nets import ResidualBlock, SelfAttention, UNet


def tiny(**config) -> UNet:
    base = {"width": 4, "multipliers": (1, 2, 2), "blocks": 1, "attention": (), "dropout": 0.0}
    return UNet(**{"shape": (1, 8, 8), **base, **config})


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_equals_the_written_out_softmax(heads):
    block = SelfAttention(8, heads=heads).double()
    torch.nn.init.normal_(block.out.weight)
    torch.nn.init.normal_(block.qkv.bias)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    # Double precision, sums of 12 and 8 terms.
    torch.testing.assert_close(block(x), self_attention_block(block, x), atol=1e-12, rtol=1e-12)


def test_attention_ignores_the_order_of_places():
    block = SelfAttention(8).double()
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x.flip(3)), block(x).flip(3), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("change, side", [(None, 6), ("down", 3), ("up", 12)])
def test_a_fresh_block_is_its_rescaled_skip(change, side):
    block = ResidualBlock(8, 8, 16, change=change)
    x = torch.randn(2, 8, 6, 6)
    y = block(x, torch.randn(2, 16))
    assert y.shape == (2, 8, side, side)
    if change is None:
        assert torch.equal(y, x * 0.5**0.5)
    else:
        mean = y.mean(dim=(2, 3))
        expected = block.skip(x.mean(dim=(2, 3), keepdim=True))[..., 0, 0] * 0.5**0.5
        # Nearest and 2x2 mean both keep the mean of the map.
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, multipliers, attention, patch, sides",
    [
        ((1, 8, 8), (1, 2, 2), (2,), 1, [8, 4, 2]),
        ((1, 28, 28), (1, 2, 2), (7,), 1, [28, 14, 7]),
        ((1, 28, 28), (1, 2), (14, 7), 2, [14, 7]),
        ((3, 32, 32), (1, 1, 2, 2), (16,), 1, [32, 16, 8, 4]),
        ((3, 32, 16), (1, 2), (32,), 1, [32, 16]),
    ],
)
def test_map_sizes(shape, multipliers, attention, patch, sides):
    net = tiny(shape=shape, multipliers=multipliers, attention=attention, patch=patch)
    seen = []
    for module in net.modules():
        if isinstance(module, (ResidualBlock, SelfAttention)):
            module.register_forward_hook(
                lambda m, _, y: seen.append((type(m).__name__, max(y.shape[2:])))
            )
    assert net(torch.randn(2, *shape), torch.rand(2)).shape == (2, *shape)
    assert sorted({side for _, side in seen}, reverse=True) == sides
    # One on the way down, one on the way up, and the middle's own.
    expected = sorted([*attention, *attention, sides[-1]])
    assert sorted(side for kind, side in seen if kind == "SelfAttention") == expected


def test_patches_are_undone_in_place():
    # With everything but the skip of the stem silenced, a pixel changes only its own patch's
    # 3x3 neighbourhood: folding and unfolding must be each other's inverse.
    net = tiny(shape=(1, 16, 16), multipliers=(1,), patch=2)
    for layer in [*net.down, *net.middle, *net.up]:
        layer.register_forward_hook(lambda m, inputs, y: inputs[0][:, :4])
    net.norm = torch.nn.Identity()
    torch.nn.init.dirac_(net.stem.weight)
    torch.nn.init.dirac_(net.head.weight)
    x = torch.randn(2, 1, 16, 16)
    y = net(x, torch.rand(2))
    torch.testing.assert_close(y, torch.nn.functional.silu(x))


def test_channels_last_gives_the_same():
    net = tiny(attention=(4,)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    expected = net(x, t)
    net.to(memory_format=torch.channels_last)
    y = net(x.contiguous(memory_format=torch.channels_last), t)
    # Another layout, another order of summation in float32.
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_compiles_without_a_break():
    net = tiny(multipliers=(1, 2), attention=(8,), classes=2).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, label = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 2])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, t, label=label), net(x, t, label=label), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    "config, message",
    [
        ({"shape": (1, 30, 30)}, r"multiples of 4, got 30x30: resize or pad"),
        ({"shape": (1, 8, 6)}, r"multiples of 4, got 8x6"),
        ({"shape": (1, 28, 28), "patch": 2}, r"3 levels and patch 2 .* multiples of 8"),
        ({"shape": (64,)}, r"\(channels, height, width\), got \(64,\)"),
        ({"attention": (16,)}, r"does not have \(it has 8, 4, 2\)"),
        ({"multipliers": ()}, r"multipliers must list numbers >= 1, got \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers must list"),
        ({"width": 0}, "width must be > 0, got 0"),
        ({"blocks": 0}, "blocks must be > 0, got 0"),
        ({"patch": 0}, "patch must be > 0, got 0"),
        ({"heads": 3}, "attention over 8 channels needs heads that divide them, got 3"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)
