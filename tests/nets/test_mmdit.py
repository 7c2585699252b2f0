"""MMDiT: a slow twin, blocks that start as the identity, conditions, resolutions, QK norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.joint_attention import joint_block
from tests.stirring import stirred

from rectiflow.flows import ClassifierFreeGuidance, FlowModel, SkipLayers, TimeShift, integrate
from rectiflow.flows.couplings import Draw, Independent, TensorData
from rectiflow.nets import MMDiT, build
from rectiflow.nets.joint_blocks import JointBlock, Projections
from rectiflow.nets.mmdit import _cut, _join
from rectiflow.training import FlowMatching

SHAPE = (2, 8, 8)


def small(seed: int = 0, **config) -> MMDiT:
    """A net with every parameter random."""
    config = {"shape": SHAPE, "depth": 3, "heads": 2, "head_dim": 8, **config}
    return stirred(build("mmdit", **config), seed=seed)


def batch(size: int = 3, *, side: int = 8, tokens: int = 5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 2, side, side, generator=generator)
    t = torch.rand(size, generator=generator)
    context = torch.randn(size, tokens, 6, generator=generator)
    return x, t, {"context": context, "pooled": torch.randn(size, 4, generator=generator)}


TEXT = {"context_dim": 6, "pooled_dim": 4}


@pytest.mark.parametrize("qk_norm", [None, "rms"])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_block_equals_its_slow_twin(qk_norm, dual, last):
    generator = torch.Generator().manual_seed(0)
    block = JointBlock(16, 4, qk_norm=qk_norm, last=last, dual=dual).double()
    state = {
        k: torch.randn(v.shape, generator=generator).double() * 0.3
        for k, v in block.state_dict().items()
    }
    block.load_state_dict(state)
    context, x, e = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((2, 3, 16), (2, 5, 16), (2, 16))
    )
    expected = joint_block(state, context, x, e, heads=4)
    # Sums in another order: a few rounding errors of float64.
    for found, wanted in zip(block(context, x, e), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_the_context_of_the_last_block_has_no_way_out():
    net = small(qk_norm="rms", dual_layers=(0, 2))
    last = {name for name, _ in net.named_parameters() if name.startswith("blocks.2.context.")}
    assert {name.split("blocks.2.context.")[1] for name in last} == {
        "modulation.weight", "modulation.bias",
        "attention.qkv.weight", "attention.qkv.bias", "attention.key_norm",
    }  # fmt: skip
    assert net.blocks[2].context.modulation.out_features == 2 * 16
    assert net.blocks[0].image.modulation.out_features == 9 * 16
    assert net.blocks[1].image.modulation.out_features == 6 * 16
    assert "blocks.2.context.attention.query_norm" in net.state_dict(), "kept for checkpoints"


def test_at_the_start_blocks_change_nothing_and_the_output_is_zero():
    net = build("mmdit", shape=SHAPE, depth=2, heads=2, head_dim=8, qk_norm="rms", dual_layers=(0,))
    context, x, e = torch.randn(2, 3, 16), torch.randn(2, 4, 16), torch.randn(2, 16)
    for block in net.blocks:
        found = block(context, x, e)
        assert torch.equal(found[0], context)
        assert torch.equal(found[1], x)
    states, t, _ = batch()
    assert torch.count_nonzero(net(states, t)) == 0


def test_context_has_no_positions():
    net = small(**TEXT, qk_norm="rms")
    x, t, given = batch()
    order = torch.tensor([4, 2, 0, 1, 3])
    found = net(x, t, context=given["context"][:, order], pooled=given["pooled"])
    torch.testing.assert_close(found, net(x, t, **given), rtol=1e-5, atol=1e-6)
    # Patches do have positions.
    moved = net(x.roll(2, 3), t, **given).roll(-2, 3)
    assert not torch.allclose(moved, net(x, t, **given), atol=1e-3)


def test_context_pooled_and_label_all_matter():
    net = small(**TEXT, classes=3)
    x, t, given = batch()
    label = torch.tensor([0, 1, 2])
    found = net(x, t, label=label, **given)
    for other in (
        {"label": label.flip(0)},
        {"context": -given["context"]},
        {"pooled": -given["pooled"]},
    ):
        assert not torch.allclose(found, net(x, t, **{"label": label, **given, **other}), atol=1e-4)


def test_the_null_condition_is_zeros_and_the_null_label():
    net = small(**TEXT, classes=3)
    x, t, given = batch(tokens=1)
    null = net.null_condition(label=torch.tensor([0, 1, 2]), **given)
    assert null["label"].tolist() == [3, 3, 3]
    assert not null["context"].any()
    assert not null["pooled"].any()
    torch.testing.assert_close(net(x, t), net(x, t, **null), rtol=1e-5, atol=1e-6)
    assert net.null_condition(context=None) == {}


def test_rms_norm_of_queries_and_keys_makes_logits_blind_to_their_scale():
    """Logits do not change when the weights of queries and keys grow; without a norm they do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator)

    def logits(norm: str | None, factor: float) -> torch.Tensor:
        part = Projections(16, 2, qk_norm=norm, silent=False)
        with torch.no_grad():
            part.qkv.weight.copy_(torch.randn(48, 16, generator=torch.Generator().manual_seed(1)))
            part.qkv.weight[:32] *= factor
            query, key, _ = part(x)
        return torch.einsum("bihd,bjhd->bhij", query, key)

    # The offset of 1e-6 in the norm is all that the factor can act on.
    torch.testing.assert_close(logits("rms", 8.0), logits("rms", 1.0), rtol=1e-4, atol=1e-4)
    assert float(logits("rms", 8.0).abs().max()) <= 8 + 1e-3, "at most the width of a head"
    torch.testing.assert_close(logits(None, 8.0), 64 * logits(None, 1.0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows, columns", [(8, 8), (4, 16), (16, 12)])
def test_one_net_takes_several_resolutions(rows, columns):
    net = small(max_size=8)
    x, t = torch.randn(2, 2, rows, columns), torch.rand(2)
    net.check(x)
    assert net(x, t).shape == x.shape


def test_a_larger_table_serves_the_centre():
    net, wide = small(), small(max_size=8)
    x, t, _ = batch()
    state = net.state_dict()
    del state["positions"]
    wide.load_state_dict(state, strict=False)
    wide.positions[2:6] = net.positions
    torch.testing.assert_close(wide(x, t), net(x, t))


def test_cutting_and_joining_have_the_orders_of_the_paper():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(x, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(_cut(x, 2) @ weight.flatten(1).T, expected)
    # Channels innermost on the way out: patch (i, j), pixel (p, q), channel c.
    tokens = torch.randn(2, 6, 12)
    image = _join(tokens, 2, 2, 3)
    assert image.shape == (2, 3, 4, 6)
    assert torch.equal(image[:, 1, 2 + 1, 4 + 0], tokens[:, 5, 1 * 6 + 0 * 3 + 1])


def test_the_net_reads_the_noise_level():
    net = small()
    seen = []
    net.time.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x, _, _ = batch()
    net(x, torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(seen[0][2], torch.tensor([1.0] * 128 + [0.0] * 128)), "no noise at t = 1"
    assert seen[0][1, 0] == torch.tensor(250.0).cos()
    assert seen[0][0, 128] == torch.tensor(1000.0).sin()


def test_skipped_layers_are_passed_over():
    net = small(**TEXT)
    x, t, given = batch()
    assert torch.equal(net(x, t, skip_layers=(), **given), net(x, t, **given))
    short = small(**TEXT, depth=2)
    state = {
        k.replace("blocks.2", "blocks.1"): v
        for k, v in net.state_dict().items()
        if "blocks.1" not in k
    }
    short.load_state_dict(state)
    torch.testing.assert_close(net(x, t, skip_layers=(1,), **given), short(x, t, **given))


def test_guidance_works_on_it():
    net = small(**TEXT, classes=3)
    model = FlowModel(net, shape=SHAPE)
    x, t, given = batch()
    given["label"] = torch.tensor([0, 1, 2])
    plain = model.velocity(x, t, **given)
    assert torch.equal(ClassifierFreeGuidance(model, 1.0).velocity(x, t, **given), plain)
    assert torch.equal(SkipLayers(model, (), 2.5).velocity(x, t, **given), plain)
    null = model.velocity(x, t, **model.null_condition(**given))
    guided = ClassifierFreeGuidance(model, 3.0).velocity(x, t, **given)
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-4, atol=1e-5)
    skipping = SkipLayers(model, (1,), 2.5, guidance=3.0, start=0.0, stop=1.0)
    skipped = model.velocity(x, t, skip_layers=(1,), **given)
    torch.testing.assert_close(
        skipping.velocity(x, t, **given), guided + 2.5 * (plain - skipped), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        assert integrate(skipping, x, 2, **given).isfinite().all()


def test_text_drops_to_the_null_condition_in_training():
    net = small(**TEXT)
    _, _, given = batch(8)
    data = TensorData(torch.randn(8, *SHAPE), given)
    method = FlowMatching(
        FlowModel(net, shape=SHAPE), Independent(data), TimeShift(3.0), condition_dropout=1.0
    )
    seen = {}
    net.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    assert method.loss(Draw.of(8)).isfinite()
    assert not seen["context"].any()
    assert not seen["pooled"].any()


def test_gradients_are_right():
    net = small(depth=2, shape=(1, 4, 4), qk_norm="rms", dual_layers=(0,), **TEXT).double()
    _, t, given = batch(1, tokens=2)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    context = given["context"].double().requires_grad_()
    pooled = given["pooled"].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, c, p: net(x, t.double(), context=c, pooled=p),
        (x, context, pooled),
        fast_mode=True,
    )


def test_a_model_folder_remakes_it(tmp_path):
    net = small(**TEXT, classes=3, qk_norm="rms", dual_layers=(1,), max_size=6)
    folder = FlowModel(net, shape=SHAPE).save_pretrained(tmp_path / "model")
    twin = FlowModel.from_pretrained(folder)
    x, t, given = batch()
    assert torch.equal(twin.net(x, t, **given), net(x, t, **given))


def test_bad_settings_are_refused():
    for config, message in (
        ({"shape": (8, 8)}, r"shape \(channels, height, width\), got \(8, 8\)"),
        ({"shape": (2, 8, 7)}, "multiples of patch 2, got 8x7"),
        ({"qk_norm": "layer"}, "unknown qk_norm 'layer'"),
        ({"dual_layers": (3,)}, r"from 0 to 2 for depth 3, got \(3,\)"),
        ({"head_dim": 0}, "head_dim must be > 0"),
        ({"heads": 1, "head_dim": 6}, "multiple of 4, got 6"),
        ({"max_size": 3}, "max_size must be >= 4 patches for this shape, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**config)


def test_check_names_what_is_wrong_with_a_condition():
    net, (x, _, given) = small(**TEXT), batch()
    net.check(x, skip_layers=(0,), **given)
    with pytest.raises(ValueError, match=r"context must have shape \(3, tokens, 6\), got \(3, 6\)"):
        net.check(x, context=given["context"][:, 0])
    with pytest.raises(ValueError, match=r"pooled must have shape \(3, 4\), got \(2, 4\)"):
        net.check(x, pooled=given["pooled"][:2])
    with pytest.raises(ValueError, match="skip_layers must be from 0 to 2, got 3"):
        net.check(x, skip_layers=(3,))
    with pytest.raises(ValueError, match="'label', 'context', 'pooled' only, got 'caption'"):
        net.check(x, caption=x)
    with pytest.raises(ValueError, match="multiples of 2 up to 8"):
        net.check(torch.zeros(1, 2, 10, 10))
