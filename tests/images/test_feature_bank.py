"""The feature bank: replay is exact, rows and slots are kept apart, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.interop.pipelines import PROMPTS, SIZE, noises, sd3, shared, tokens
from tests.stirring import stirred
from torch import nn

from rectiflow.flows import FlowModel
from rectiflow.images import FeatureBank
from rectiflow.images.attention_taps import attentions, network_of
from rectiflow.interop.diffusers import encode_prompts, from_pipeline
from rectiflow.nets import MMDiT


def ours(**options: Any) -> FlowModel:
    net = MMDiT(shape=(1, 8, 8), depth=3, heads=2, head_dim=8, classes=4, **options)
    return FlowModel(stirred(net, 0.3), shape=(1, 8, 8)).eval()


def case(name: str) -> tuple[FlowModel, torch.Tensor, dict[str, Any], dict[str, Any]]:
    """A model, states, and two conditions under which it says different things."""
    generator = torch.Generator().manual_seed(1)
    if name in ("mmdit", "dual"):
        model = ours(qk_norm="rms", dual_layers=(2,)) if name == "dual" else ours()
        x = torch.randn(2, 1, 8, 8, generator=generator)
        return model, x, {"label": torch.tensor([0, 1])}, {"label": torch.tensor([2, 3])}
    kind = "sd3" if name == "medium" else name
    pipe = sd3(medium=True) if name == "medium" else shared(name)
    rows = encode_prompts(pipe, PROMPTS, tokens=tokens(kind), cache=None).everything()
    model = from_pipeline(pipe, size=SIZE, tokens=tokens(kind))
    return model, noises(), rows, {key: value.flip(0) for key, value in rows.items()}


CASES = ("mmdit", "dual", "sd3", "medium", "flux")
T = torch.tensor([0.3, 0.7])


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_invariant_7_replay_of_the_same_call_changes_nothing(name: str) -> None:
    model, x, first, _ = case(name)
    plain = model.velocity(x, T, **first)
    bank = FeatureBank(model, select=".")
    with bank.attached():
        bank.mode = "record"
        assert torch.equal(model.velocity(x, T, **first), plain)
        bank.mode = "replay"
        assert torch.equal(model.velocity(x, T, **first), plain)
    assert bank.bytes > 0


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_replay_puts_values_in_and_leaves_queries_and_keys(name: str) -> None:
    model, x, first, second = case(name)
    outputs = {}
    for what in ("value", ("query", "key", "value")):
        bank = FeatureBank(model, select=".", what=what)
        with bank.attached():
            bank.mode = "record"
            source = model.velocity(x, T, **first)
            bank.mode = "replay"
            outputs[what] = model.velocity(x, T, **second)
    plain = model.velocity(x, T, **second)
    found = outputs["value"]
    # The target's queries and keys stay, so it is neither the source's output nor the target's.
    for other in (plain, source, outputs["query", "key", "value"]):
        assert (found - other).abs().max() > 1e-5


@torch.no_grad()
def test_a_block_with_replaced_values_is_attention_over_them() -> None:
    """The twin: the attention output of our block, computed by hand from the stored values."""
    model, x, first, second = case("mmdit")
    block, seen = model.net.blocks[1], {}
    bank = FeatureBank(model, select=r"blocks\.1$")
    with bank.attached():
        bank.mode = "record"
        model.velocity(x, T, **first)
        bank.mode = "replay"

        def ask(_: nn.Module, given: Any, made: Any) -> None:
            seen["queries"] = made

        # Registered after the bank's hook, so it sees what attention gets.
        handles = [block.image.attention.register_forward_hook(ask)]
        handles.append(
            block.image.attention.out.register_forward_hook(
                lambda _, given, made: seen.update(mixed=given[0])
            )
        )
        handles.append(
            block.context.attention.register_forward_hook(
                lambda _, given, made: seen.update(context=made)
            )
        )
        model.velocity(x, T, **second)
        for handle in handles:
            handle.remove()
    values = [bank._kept[0, 0, f"blocks.1.{part}.value"] for part in ("context", "image")]
    query = seen["queries"][0]
    key = torch.cat([seen["context"][1], seen["queries"][1]], 1)
    value = torch.cat(values, 1)
    weights = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    mixed = torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), value).flatten(2)
    torch.testing.assert_close(seen["mixed"], mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind_after_an_exception(name: str) -> None:
    model, x, first, _ = case(name)
    net = network_of(model)
    processors = dict(getattr(net, "attn_processors", {}))
    bank = FeatureBank(model)

    def stop_halfway() -> None:
        with bank.attached():
            assert not processors or dict(net.attn_processors) != processors
            raise RuntimeError("halfway")

    def replay_nothing() -> None:
        bank.mode = "replay"
        with bank.attached(), torch.no_grad():
            model.velocity(x, T, **first)

    def is_clean() -> bool:
        hooked = any(module._forward_hooks for module in net.modules())
        same = dict(getattr(net, "attn_processors", {})) == processors
        return same and not hooked and bank.mode == "off"

    with pytest.raises(RuntimeError, match="halfway"):
        stop_halfway()
    assert is_clean()
    # Also where the exception comes from inside a processor at work.
    with pytest.raises(ValueError, match="nothing was recorded for step 0, evaluation 0"):
        replay_nothing()
    assert is_clean()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mmdit", "flux"])
def test_one_source_serves_several_targets(name: str) -> None:
    model, x, first, second = case(name)
    bank = FeatureBank(model)
    with bank.attached():
        bank.mode = "record"
        model.velocity(x, T, **first)
        bank.mode = "replay"
        wide = {k: v.repeat_interleave(3, 0) for k, v in second.items()}
        many = model.velocity(x.repeat_interleave(3, 0), T.repeat_interleave(3), **wide)
        single = model.velocity(x, T, **second)
    # Another batch size sums in another order.
    torch.testing.assert_close(many[::3], single, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(many[2::3], single, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_that_take_no_part_are_left_alone() -> None:
    model, x, first, second = case("mmdit")
    both = {"label": torch.cat([second["label"], first["label"]])}
    stacked, times = torch.cat([x, x]), torch.cat([T, T])
    plain = model.velocity(stacked, times, **both)
    bank = FeatureBank(model)
    with bank.attached():
        bank.mode = "record"
        model.velocity(x, T, **first)
        bank.mode, bank.rows = "replay", torch.tensor([True, True, False, False])
        found = model.velocity(stacked, times, **both)
    assert torch.equal(found[2:], plain[2:])
    assert (found[:2] - plain[:2]).abs().max() > 1e-4


@torch.no_grad()
def test_steps_and_evaluations_have_slots_of_their_own() -> None:
    model, x, first, _ = case("mmdit")
    bank = FeatureBank(model)
    with bank.attached():
        bank.mode = "record"
        for bank.step in (0, 1):
            for bank.stage in (0, 1):
                model.velocity(x + bank.step, T + 0.1 * bank.stage, **first)
        assert len(bank) == 2 * 2 * 2 * len(bank.names)
        per = 2 * (16 + 1) * 16 * 4  # rows, image and label tokens, width, bytes
        assert bank.bytes == 2 * 2 * len(bank.names) * per
        # Not views, which would keep the whole projections alive.
        assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in bank._kept.values())
        bank.mode, bank.step = "replay", 2
        with pytest.raises(ValueError, match="same solver and the same number of steps"):
            model.velocity(x, T, **first)
    bank.clear()
    assert (len(bank), bank.bytes) == (0, 0)


@torch.no_grad()
def test_dtype_place_and_budget() -> None:
    model, x, first, _ = case("mmdit")
    half = FeatureBank(model, where="cpu", dtype=torch.bfloat16)
    with half.attached():
        half.mode = "record"
        plain = model.velocity(x, T, **first)
        half.mode = "replay"
        found = model.velocity(x, T, **first)
    assert 0 < (found - plain).abs().max() < 0.05
    full = FeatureBank(model)
    with full.attached():
        full.mode = "record"
        model.velocity(x, T, **first)
    assert full.bytes == 2 * half.bytes
    small = FeatureBank(model, budget=full.bytes - 1)
    small.mode = "record"
    with small.attached(), pytest.raises(ValueError, match="more than its budget of"):
        model.velocity(x, T, **first)


def test_later_blocks_are_chosen_and_patterns_choose_others() -> None:
    assert FeatureBank(ours()).names == ("blocks.1", "blocks.2")
    assert FeatureBank(case("sd3")[0]).names == ("transformer_blocks.1.attn",)
    assert FeatureBank(shared("flux").transformer).names == ("single_transformer_blocks.0.attn",)
    assert FeatureBank(case("flux")[0], select=r"^transformer_blocks\.0").names == (
        "transformer_blocks.0.attn",
    )
    assert attentions(sd3(medium=True).transformer)[:2] == [
        "transformer_blocks.0.attn",
        "transformer_blocks.0.attn2",
    ]


def test_wrong_choices_are_refused() -> None:
    model = ours()
    with pytest.raises(ValueError, match=r"names run from blocks\.0 to blocks\.2"):
        FeatureBank(model, select="single")
    with pytest.raises(ValueError, match="is no regular expression"):
        FeatureBank(model, select="(")
    with pytest.raises(ValueError, match="unknown attention feature 'values': did you mean"):
        FeatureBank(model, what="values")
    with pytest.raises(ValueError, match="unknown place 'disk'"):
        FeatureBank(model, where="disk")
    with pytest.raises(ValueError, match="Linear has no attention whose values can be kept"):
        FeatureBank(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown mode 'play': did you mean 'replay'"):
        FeatureBank(model).mode = "play"
    pipe = sd3()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        FeatureBank(pipe.transformer)


@torch.no_grad()
def test_conditions_of_other_lengths_are_refused() -> None:
    net = MMDiT(shape=(1, 8, 8), depth=2, heads=2, head_dim=8, context_dim=4)
    model, x = FlowModel(net).eval(), torch.zeros(1, 1, 8, 8)
    bank = FeatureBank(model)
    with bank.attached():
        bank.mode = "record"
        model.velocity(x, torch.zeros(1), context=torch.zeros(1, 5, 4))
        bank.mode = "replay"
        with pytest.raises(ValueError, match="same number of tokens"):
            model.velocity(x, torch.zeros(1), context=torch.zeros(1, 6, 4))
