"""Low-rank adapters and differences of weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from rectiflow.distill import (
    OneStepDistillation,
    Reflow,
    add_delta,
    load_lora,
    lora_delta,
    merge_lora,
    save_lora,
    weight_delta,
    with_lora,
)
from rectiflow.flows import FlowModel, Independent
from rectiflow.nets import MLP
from rectiflow.training import Trainer, TrainerSettings


def model(seed: int = 0) -> FlowModel:
    torch.manual_seed(seed)
    return FlowModel(MLP(shape=(3,), width=8, depth=2, zero=False, classes=2), shape=(3,))


def at() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, generator=generator), torch.rand(5, generator=generator)


def adapted(seed: int = 0) -> FlowModel:
    """Adapters that say something: both factors random."""
    found = with_lora(model(seed), 2, ["inner", "outer"], alpha=3.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def test_delta_is_the_product_of_the_factors() -> None:
    thin = adapted()
    state = thin.net.net.state_dict()
    a = state["blocks.1.outer.lora_A.default.weight"]
    b = state["blocks.1.outer.lora_B.default.weight"]
    torch.testing.assert_close(lora_delta(thin)["blocks.1.outer.weight"], b @ a * 3 / 2)
    assert len(lora_delta(thin)) == 4


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    plain = model()
    before = {name: p.clone() for name, p in plain.named_parameters()}
    thin = with_lora(plain, 2)
    x, t = at()
    torch.testing.assert_close(thin.velocity(x, t), plain.velocity(x, t))
    wanted = [name for name, p in thin.named_parameters() if p.requires_grad]
    assert wanted
    assert all("lora_" in name for name in wanted)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("method", [Reflow, OneStepDistillation])
def test_methods_train_the_adapters_alone(method) -> None:
    start = with_lora(model(), 2)
    trained = Trainer(
        method(start, Independent(torch.randn(32, 3))), TrainerSettings(steps=3, batch_size=8)
    ).fit()
    changed = {
        name
        for (name, a), b in zip(start.named_parameters(), trained.parameters())
        if not torch.equal(a, b)
    }
    assert changed
    assert all("lora_" in name for name in changed)


def test_merging_keeps_the_field_and_takes_the_adapters_off() -> None:
    """Invariant 8: merged weights are those of the base plus the difference."""
    thin, x, t = adapted(), *at()
    merged = merge_lora(thin)
    torch.testing.assert_close(merged.velocity(x, t), thin.velocity(x, t))
    assert merged.net.config == model().net.config
    assert set(merged.state_dict()) == set(model().state_dict())
    again = add_delta(model(), lora_delta(thin))
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[name])
    # The one that was merged goes on as it was.
    assert "lora_A" in " ".join(thin.state_dict())


def test_differences_merge_and_unmerge_exactly() -> None:
    """Invariant 8, on weights whose sums are exact: W_flow + (W_custom - W_base), and back."""
    flow, base, custom = model(0), model(1), model(2)
    with torch.no_grad():
        for each in (flow, base, custom):
            for p in each.parameters():
                p.copy_((p * 1024).round() / 1024)
    delta = weight_delta(custom, base)
    merged = add_delta(flow, delta)
    for name, value in merged.state_dict().items():
        expected = flow.state_dict()[name] + (custom.state_dict()[name] - base.state_dict()[name])
        assert torch.equal(value, expected)
    back = add_delta(merged, delta, scale=-1)
    assert all(torch.equal(v, flow.state_dict()[n]) for n, v in back.state_dict().items())
    assert [entry["scale"] for entry in back.lineage] == [1.0, -1]
    assert weight_delta(base, base) == {}


def test_unmerging_ordinary_weights_is_exact_to_rounding() -> None:
    flow = model(0)
    delta = weight_delta(model(2), model(1))
    back = add_delta(add_delta(flow, delta), delta, scale=-1)
    for name, value in back.state_dict().items():
        # Half a unit in the last place of each of two sums of numbers below one.
        torch.testing.assert_close(value, flow.state_dict()[name], atol=2.4e-7, rtol=0)


def test_adapters_have_a_file_of_their_own(tmp_path) -> None:
    thin, x, t = adapted(), *at()
    file = save_lora(thin, tmp_path / "adapters.safetensors")
    again = load_lora(model(), file)
    assert torch.equal(again.velocity(x, t), thin.velocity(x, t))
    # 2 blocks x 2 layers x two factors of 2 x 8 numbers.
    assert file.stat().st_size < 4 * (2 * 2 * 2 * 16) + 1200
    with pytest.raises(ValueError, match="saved as safetensors only"):
        save_lora(thin, tmp_path / "adapters.pt")
    with pytest.raises(FileNotFoundError, match="give a file of save_lora"):
        load_lora(model(), tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no adapters of save_lora"):
        load_lora(model(), tmp_path / "other.safetensors")
    wider = FlowModel(MLP(shape=(3,), width=16, depth=2))
    with pytest.raises(ValueError, match="belongs to another network"):
        load_lora(wider, file)


def test_model_folder_keeps_adapters(tmp_path) -> None:
    thin, x, t = adapted(), *at()
    folder = thin.save_pretrained(tmp_path / "model")
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ".md"}
    again = FlowModel.from_pretrained(folder)
    assert torch.equal(again.velocity(x, t), thin.velocity(x, t))
    torch.testing.assert_close(merge_lora(again).velocity(x, t), thin.velocity(x, t))
    label = torch.zeros(5, dtype=torch.int64)
    assert again.null_condition(label=label)["label"].tolist() == [2] * 5
    assert again.conditional


def test_same_seed_same_adapters() -> None:
    plain = model()
    state = torch.get_rng_state()
    one, two = with_lora(plain, 2, seed=3), with_lora(plain, 2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    other = with_lora(plain, 2, seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"no layer is called to_q: .* such as time_in, shift"):
        with_lora(model(), 2, ["to_q"])
    with pytest.raises(ValueError, match="has adapters already: merge_lora first"):
        with_lora(adapted(), 2)
    with pytest.raises(ValueError, match="rank must be > 0, got 0"):
        with_lora(model(), 0)
    for function in (merge_lora, lora_delta):
        with pytest.raises(ValueError, match="has no adapters: make them by with_lora"):
            function(model())
    with pytest.raises(ValueError, match="the networks differ in"):
        weight_delta(model(), FlowModel(MLP(shape=(3,), width=4, depth=2)))
    with pytest.raises(ValueError, match="belongs to another network"):
        add_delta(model(), {"blocks.0.inner.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="belongs to another network"):
        add_delta(model(), {"absent": torch.zeros(2, 2)})
