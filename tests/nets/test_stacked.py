"""Two networks in series; what all networks do is in test_common."""

from __future__ import annotations

import pytest
import torch
from tests.nets.test_common import batch
from tests.stirring import stirred
from torch import nn

from rectiflow.flows import FlowModel, integrate
from rectiflow.nets import MLP, DiffusionVelocity, MMDiT, Stacked, build


def part(seed: int, **config) -> MLP:
    torch.manual_seed(seed)
    return MLP(shape=(1, 8, 8), width=8, depth=1, time_features=8, zero=False, **config)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("mode", ["chain", "residual"])
def test_second_takes_what_the_first_makes(mode: str) -> None:
    first, second = part(0), part(1)
    x, t = batch()
    h = first(x, t)
    expected = second(h, t) if mode == "chain" else h + second(
        x + (1 - t).view(-1, 1, 1, 1) * h, t
    )  # fmt: skip
    stack = Stacked.of(first, second, mode=mode)
    torch.testing.assert_close(stack(x, t), expected)
    assert size(stack) == size(first) + size(second)


def test_single_is_the_first_alone() -> None:
    """Invariant 9."""
    first = part(0, classes=3)
    stack = Stacked.of(first, mode="single")
    x, t = batch()
    label = torch.tensor([0, 1, 2, 3])
    assert torch.equal(stack(x, t, label=label), first(x, t, label=label))
    assert size(stack) == size(first)
    assert build("stacked", **stack.config).second is None


def test_residual_with_a_silent_second_changes_nothing() -> None:
    first = part(0)
    silent = MLP(shape=(1, 8, 8), width=4, depth=1)
    x, t = batch()
    assert torch.equal(Stacked.of(first, silent, mode="residual")(x, t), first(x, t))


def test_both_halves_begin_as_the_one_given_and_part() -> None:
    first = part(0)
    stack = Stacked.of(first)
    assert all(torch.equal(a, b) for a, b in zip(stack.first.parameters(), first.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(stack.second.parameters(), first.parameters()))
    with torch.no_grad():
        next(stack.second.parameters()).add_(1)
    assert not torch.equal(next(stack.first.parameters()), next(stack.second.parameters()))


def test_folder_opens_again(tmp_path) -> None:
    model = FlowModel(Stacked.of(part(0), part(1)), shape=(1, 8, 8))
    again = FlowModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    x, t = batch()
    assert torch.equal(again.velocity(x, t), model.velocity(x, t))


def test_stacked_transformers_take_their_text() -> None:
    net = stirred(MMDiT(shape=(1, 4, 4), depth=1, head_dim=8, context_dim=6))
    model = FlowModel(Stacked.of(net), shape=(1, 4, 4))
    assert net.conditional
    assert model.conditional
    x, context = torch.randn(2, 1, 4, 4), torch.randn(2, 3, 6)
    given = integrate(model, x, 2, context=context)
    assert not torch.allclose(given, integrate(model, x, 2))
    assert not FlowModel(Stacked.of(part(0)), shape=(1, 8, 8)).conditional
    wrapped = FlowModel(DiffusionVelocity(net=net), shape=(1, 4, 4))
    assert wrapped.conditional
    assert integrate(wrapped, x, 2, context=context).isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown mode 'chian': did you mean 'chain'"):
        Stacked(shape=(2,), mode="chian")
    with pytest.raises(ValueError, match="unknown mode 'chian'"):
        Stacked.of(part(0), mode="chian")
    with pytest.raises(ValueError, match="'single' has no second network"):
        Stacked(shape=(2,), second="mlp", mode="single")
    with pytest.raises(ValueError, match="a Linear cannot be stacked: it needs a name and a"):
        Stacked.of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"DiffusionVelocity cannot be stacked: .* own shape"):
        Stacked.of(DiffusionVelocity(net=part(0)))
    with pytest.raises(ValueError, match="must be of one shape"):
        Stacked.of(part(0), MLP(shape=(2,), width=4, depth=1))
