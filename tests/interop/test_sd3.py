"""Weights of Stable Diffusion 3: equal to diffusers both ways, round trips, detection."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from tests.stirring import stirred

from rectiflow.interop import sd3
from rectiflow.nets import MMDiT

KINDS = {
    "plain": {"qk_norm": None, "dual_attention_layers": ()},
    "rms": {"qk_norm": "rms_norm", "dual_attention_layers": ()},
    "rms and dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}
EVERY = pytest.mark.parametrize("kind", sorted(KINDS))


@cache
def theirs(kind: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=10,
            pos_embed_max_size=6,
            **KINDS[kind],
        )
    return stirred(made, seed=1)


def ours(kind: str) -> MMDiT:
    net = MMDiT(
        shape=(3, 8, 8),
        depth=3,
        heads=4,
        head_dim=8,
        context_dim=12,
        pooled_dim=10,
        qk_norm="rms" if KINDS[kind]["qk_norm"] else None,
        dual_layers=KINDS[kind]["dual_attention_layers"],
        max_size=6,
        position_scale=0.37,
        position_offset=-0.4,
    )
    return stirred(net, seed=2)


def inputs(height: int = 8, width: int = 8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, height, width, generator=generator)
    t = torch.rand(2, generator=generator)
    context = torch.randn(2, 5, 12, generator=generator)
    return x, t, context, torch.randn(2, 10, generator=generator)


def both(
    net: MMDiT, transformer: torch.nn.Module, **size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x, t, context, pooled = inputs(**size)
    with torch.no_grad():
        found = net(x, t, context=context, pooled=pooled)
        said = transformer(x, context, pooled, 1000 * (1 - t), return_dict=False)[0]
    return found, -said


# Float32 sums in another order; outputs are of order one.
CLOSE = {"rtol": 0, "atol": 1e-5}


@EVERY
def test_their_weights_give_their_output(kind):
    transformer = theirs(kind)
    net = sd3.from_diffusers(transformer)
    found, said = both(net, transformer)
    assert float(said.abs().max()) > 0.1
    torch.testing.assert_close(found, said, **CLOSE)
    # Another aspect ratio: a crop of the same table.
    torch.testing.assert_close(*both(net, transformer, height=12, width=4), **CLOSE)


@EVERY
def test_our_weights_give_our_output_there(kind):
    net = ours(kind)
    found, said = both(net, sd3.to_diffusers(net))
    torch.testing.assert_close(found, said, **CLOSE)


@EVERY
def test_diffusers_converts_the_original_layout_alike(kind):
    """Their own converter, from our export in the original layout, gives our export to theirs."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    net = ours(kind)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(sd3.to_state(net, "stability"))
    direct = sd3.to_state(net, "diffusers")
    assert converted.keys() == direct.keys()
    assert all(torch.equal(converted[name], direct[name]) for name in direct)


@EVERY
@pytest.mark.parametrize("layout", sd3.LAYOUTS)
def test_there_and_back_is_the_identity(kind, layout):
    net = ours(kind)
    state = sd3.to_state(net, layout)
    back = sd3.from_checkpoint(state, head_dim=8, side=8)
    for name, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    again = sd3.to_state(back, layout)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@EVERY
@pytest.mark.parametrize("layout", sd3.LAYOUTS)
def test_the_architecture_is_read_off_the_weights(kind, layout):
    net = ours(kind)
    found = sd3.detect(sd3.to_state(net, layout), head_dim=8, side=8)
    given = {**net.config, "position_scale": None, "position_offset": None}
    for key, value in found.items():
        if key != "position_scale":
            assert (list(value) if isinstance(value, tuple) else value) == given[key], key


def test_a_converted_net_is_a_net_of_its_own():
    transformer = theirs("rms")
    net = sd3.from_diffusers(transformer)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            assert p.requires_grad
            p.zero_()
    assert all(torch.equal(before[name], v) for name, v in transformer.state_dict().items())


def test_single_files_with_other_parts_are_read(tmp_path):
    net = ours("rms and dual")
    state = {sd3.PREFIX + name: v for name, v in sd3.to_state(net, "stability").items()}
    save_file({**state, "first_stage_model.x": torch.zeros(1)}, tmp_path / "sd3.safetensors")
    back = sd3.from_checkpoint(tmp_path / "sd3.safetensors", side=8)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in net.state_dict().items())
    save_file(sd3.to_state(net, "diffusers"), tmp_path / "transformer.safetensors")
    assert sd3.from_checkpoint(tmp_path / "transformer.safetensors", side=8).config["depth"] == 3


def test_what_cannot_be_converted_is_refused(tmp_path):
    net = ours("rms")
    state = sd3.to_state(net, "stability")
    with pytest.raises(ValueError, match="not the weights of a Stable Diffusion 3 transformer"):
        sd3.from_checkpoint({"weight": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        sd3.from_checkpoint(tmp_path / "none.safetensors")
    short = {k: v for k, v in state.items() if k != "final_layer.linear.bias"}
    with pytest.raises(ValueError, match=r"lack 'final_layer.linear.bias'"):
        sd3.from_checkpoint(short, side=8)
    with pytest.raises(ValueError, match="hold 'extra'"):
        sd3.from_checkpoint({**state, "extra": torch.zeros(1)}, side=8)
    learned = {**state, "pos_embed": torch.randn_like(state["pos_embed"])}
    with pytest.raises(ValueError, match="cannot be converted"):
        sd3.from_checkpoint(learned, side=8)
    with pytest.raises(ValueError, match="unknown layout 'difusers'"):
        sd3.to_state(net, "difusers")
    with pytest.raises(ValueError, match="no labels"):
        sd3.to_state(MMDiT(shape=(1, 8, 8), depth=1, classes=3), "stability")
    plain = sd3.to_state(ours("plain"), "stability")
    with pytest.raises(ValueError, match="no multiple of head_dim 64"):
        sd3.from_checkpoint(plain, side=8)
