from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rectiflow.flows import FlowModel, GaussianField, VariancePreservingPath
from rectiflow.flows.couplings import Draw, Independent, TensorData
from rectiflow.images import DomainTransfer, domain_classifier, transfer
from rectiflow.nets import build
from rectiflow.training import FlowMatching, Trainer, TrainerSettings
from rectiflow.training.evaluation.feature_net import FeatureNet


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(shape: tuple[int, ...] = (3,)) -> FlowModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlowModel(build("mlp", shape=shape, width=8, depth=1, zero=False), shape=shape)


def plain_loss(model: FlowModel, source: Tensor, target: Tensor, draw: Draw) -> Tensor:
    return FlowMatching(model, Independent(target, source=source)).loss(draw)


def test_identity_features_give_the_plain_loss() -> None:
    model, source, target = small(), normal(20, 3), normal(20, 3, seed=1)
    method = DomainTransfer(model, source, target, features=lambda x: x, plain=0.0)
    expected = plain_loss(model, source, target, Draw.of(16))
    assert method.loss(Draw.of(16)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_linear_features_give_the_projected_loss() -> None:
    model, source, target = small(), normal(20, 3), normal(20, 3, seed=1)
    matrix = normal(2, 3, seed=2)
    method = DomainTransfer(model, source, target, features=lambda x: x @ matrix.T, plain=0.25)
    draw = Draw.of(16)
    pairs = method.coupling.draw(draw)
    t = method.times.sample(16, generator=draw.generator)
    state = model.path.interpolate(pairs.source, pairs.target, t)
    wrong = model(state, t) - (pairs.target - pairs.source)
    expected = (wrong @ matrix.T).square().mean() + 0.25 * wrong.square().mean()
    # The same sums in another order.
    assert method.loss(Draw.of(16)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_equals_a_jacobian_formed_in_full() -> None:
    shape = (1, 6, 6)
    net = FeatureNet(shape, 2, seed=3).requires_grad_(False)
    model, source, target = small(shape), normal(8, *shape), normal(8, *shape, seed=1)
    method = DomainTransfer(model, source, target, features=net, plain=0.0)
    draw = Draw.of(4)
    pairs = method.coupling.draw(draw)
    t = method.times.sample(4, generator=draw.generator)
    state = model.path.interpolate(pairs.source, pairs.target, t)
    wrong = (model(state, t) - (pairs.target - pairs.source)).flatten(1)
    slow = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda x: net(x[None])[0], one).flatten(1) @ d
            for one, d in zip(state, wrong)
        ]
    )
    assert method.loss(Draw.of(4)).item() == pytest.approx(slow.square().mean().item(), rel=1e-4)


def test_gradient_equals_finite_differences() -> None:
    model = small().double()
    source, target = normal(9, 3, dtype=torch.float64), normal(9, 3, seed=1, dtype=torch.float64)
    method = DomainTransfer(model, source, target, features=torch.tanh, plain=0.0)
    weight = model.net.head.weight

    def at(shift: float) -> float:
        with torch.no_grad():
            weight[0, 0] += shift
            value = method.loss(Draw.of(8)).item()
            weight[0, 0] -= shift
        return value

    method.loss(Draw.of(8)).backward()
    # Central differences of step h err by h² = 1e-10 of the third derivative.
    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    assert weight.grad[0, 0].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_without_features_the_loss_is_plain() -> None:
    model, source, target = small(), normal(20, 3), normal(20, 3, seed=1)
    expected = plain_loss(model, source, target, Draw.of(8))
    assert DomainTransfer(model, source, target).loss(Draw.of(8)).item() == expected.item()


def test_starts_from_the_source_domain_and_ignores_labels() -> None:
    data = TensorData(torch.full((5, 2), 3.0), {"label": torch.zeros(5, dtype=torch.int64)})
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x - 3 * t[:, None])
        return torch.zeros_like(x)

    DomainTransfer(FlowModel(net), torch.zeros(4, 2), data).loss(Draw.of(6))
    # x_t = 3 t when sources are 0 and targets are 3; a label would be an unexpected argument.
    torch.testing.assert_close(seen[0], torch.zeros(6, 2), rtol=0, atol=1e-6)


def test_transfer_follows_the_exact_map_from_given_sources() -> None:
    field = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
    model = FlowModel(lambda x, t: field.velocity(x, t), shape=(1,))
    images = normal(5, 1)
    # RK4 with 50 steps errs by less than 1e-5.
    found = transfer(model, images, steps=50, solver="rk4", batch_size=2)
    torch.testing.assert_close(found, 2 + 0.5 * images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model, message",
    [
        (FlowModel(lambda x, t: x, prediction="data"), "predicts 'data'"),
        (FlowModel(lambda x, t: x, VariancePreservingPath()), "starts at its sources"),
    ],
)
def test_refuses_models_that_cannot_be_compared(model: FlowModel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainTransfer(model, torch.zeros(2, 2), torch.zeros(2, 2))


def test_domain_classifier_knows_dark_from_light() -> None:
    dark = 0.3 * normal(40, 1, 8, 8) - 0.5
    light = 0.3 * normal(30, 1, 8, 8, seed=1) + 0.5
    state = torch.random.get_rng_state()
    net, accuracy = domain_classifier(dark, light)
    assert accuracy == 1.0
    assert torch.equal(state, torch.random.get_rng_state())
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    features = net(torch.cat([dark, light]))
    # Standardised on four fifths of these images.
    assert abs(features.mean().item()) < 0.2
    assert features.var(0).mean().item() == pytest.approx(1, abs=0.3)


def test_domain_classifier_refuses_unequal_or_few_images() -> None:
    with pytest.raises(ValueError, match="one shape"):
        domain_classifier(torch.zeros(9, 1, 8, 8), torch.zeros(9, 1, 9, 9))
    with pytest.raises(ValueError, match="5 images or more"):
        domain_classifier(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_trains_through_a_classifier() -> None:
    shape = (1, 8, 8)
    features = FeatureNet(shape, 2, seed=1).eval().requires_grad_(False)
    method = DomainTransfer(
        small(shape), normal(9, *shape), normal(9, *shape, seed=1), features=features
    )
    before = method.model.net.stem.weight.clone()
    trained = Trainer(method, TrainerSettings(steps=2, batch_size=4, ema=0)).fit()
    assert not torch.equal(before, trained.net.stem.weight)
