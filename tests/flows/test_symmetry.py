"""Flips of pairs and of networks."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import (
    ClassifierFreeGuidance,
    FlowModel,
    PairSymmetry,
    Symmetrized,
    integrate,
)
from rectiflow.flows.couplings import Draw, Pairs
from rectiflow.flows.symmetry import hflip
from rectiflow.nets import build


class Fixed:
    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.source = torch.randn(count, 1, 4, 4, generator=generator)
        self.target = torch.randn(count, 1, 4, 4, generator=generator)

    def draw(self, draw: Draw) -> Pairs:
        label = torch.arange(len(self.source))
        return Pairs(self.source[draw.part], self.target[draw.part], {"label": label[draw.part]})


def net() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build("mlp", shape=(1, 4, 4), width=24, depth=1, zero=False).double()


def test_invariant_4_a_flip_twice_is_no_flip():
    x = torch.randn(3, 2, 4, 5)
    assert torch.equal(hflip(hflip(x)), x)
    assert torch.equal(hflip(x)[:, :, 1, 0], x[:, :, 1, 4])


def test_invariant_4_flipped_pairs_of_an_equivariant_teacher_are_its_pairs():
    teacher = FlowModel(Symmetrized(net()), shape=(1, 4, 4))
    source = Fixed(8).source.double()
    with torch.no_grad():
        target = integrate(teacher, source, 10, "heun")
        torch.testing.assert_close(
            integrate(teacher, hflip(source), 10, "heun"), hflip(target), atol=1e-5, rtol=0
        )
        plain = FlowModel(net(), shape=(1, 4, 4))
        apart = integrate(plain, hflip(source), 10, "heun") - hflip(
            integrate(plain, source, 10, "heun")
        )
    assert apart.abs().max() > 1e-2


def test_noise_and_result_are_flipped_together_each_sample_by_its_own_coin():
    base = Fixed()
    pairs = PairSymmetry(base).draw(Draw.of(64))
    turned = torch.tensor(
        [torch.equal(a, hflip(b[None])[0]) for a, b in zip(pairs.source, base.source)]
    )
    # 64 fair coins.
    assert 16 < int(turned.sum()) < 48
    for rows, kept in ((turned, hflip), (~turned, lambda x: x)):
        assert torch.equal(pairs.source[rows], kept(base.source[rows]))
        assert torch.equal(pairs.target[rows], kept(base.target[rows]))
    assert torch.equal(pairs.condition["label"], torch.arange(64))


def test_parts_make_the_whole():
    coupling = PairSymmetry(Fixed())
    whole = coupling.draw(Draw.of(64, step=2)).target
    parts = [coupling.draw(Draw.of(64, step=2, part=slice(i, i + 32))).target for i in (0, 32)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(coupling.draw(Draw.of(64, step=3)).target, whole)


def test_any_transform_will_do():
    def turn(x):
        return x.transpose(2, 3)

    base = Fixed()
    pairs = PairSymmetry(base, turn).draw(Draw.of(64))
    changed = (pairs.target != base.target).flatten(1).any(1)
    assert torch.equal(pairs.target[changed], turn(base.target[changed]))
    assert torch.equal(pairs.source[changed], turn(base.source[changed]))
    assert 16 < int(changed.sum()) < 48


def test_wrong_symmetries():
    with pytest.raises(ValueError, match="unknown symmetry 'vflip': did you mean 'hflip'"):
        PairSymmetry(Fixed(), "vflip")
    with pytest.raises(ValueError, match=r"only images .* can be mirrored, got shape \(2, 3\)"):
        hflip(torch.zeros(2, 3))


def test_conditions_show_through_a_symmetrised_network():
    inner = build("mlp", shape=(1, 4, 4), width=8, depth=1, classes=3, zero=False)
    model = FlowModel(Symmetrized(inner), shape=(1, 4, 4))
    assert (model.classes, model.conditional) == (3, True)
    assert not FlowModel(Symmetrized(net()), shape=(1, 4, 4)).conditional
    assert model.null_condition(label=torch.tensor([1]))["label"].tolist() == [3]
    with pytest.raises(ValueError, match="label"):
        integrate(model, torch.zeros(1, 1, 4, 4), 1, label=torch.tensor([7]))
    guided = ClassifierFreeGuidance(model, 2.0)
    assert integrate(guided, torch.ones(1, 1, 4, 4), 1, label=torch.tensor([1])).isfinite().all()
