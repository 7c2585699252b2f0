"""AlignProp and its adapters: what is trained, what stays, what comes out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from tests.align.tiny import Linear, gradients, model, noises

from rectiflow.align import (
    AlignProp,
    EarlyStop,
    FieldDrift,
    Fixed,
    LastK,
    Normal,
    RangePenalty,
    RewardCurve,
    Rollout,
    Uniform,
    diversity,
    gaussian_lora,
    measure,
    mix_adapters,
    scale_adapter,
)
from rectiflow.align.rewards import Brightness
from rectiflow.distill import merge_lora
from rectiflow.flows import ClassifierFreeGuidance, FlowModel, sample
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.training import OptimizerSettings, Trainer, TrainerSettings

SHAPE = (1, 2, 2)


def settings(steps: int = 4, **options) -> TrainerSettings:
    optim = OptimizerSettings(name="adamw", learning_rate=options.pop("rate", 1e-2))
    return TrainerSettings(steps=steps, batch_size=8, ema=0.0, optim=optim, **options)


def aligned(steps: int = 4, **options) -> tuple[AlignProp, FlowModel]:
    method = AlignProp(model(SHAPE), Brightness(), truncation=Fixed(), **options)
    return method, Trainer(method, settings(steps)).fit()


def labels(classes: int = 3) -> TensorData:
    return TensorData(torch.zeros(classes), {"label": torch.arange(classes)})


def test_loss_is_minus_the_mean_reward_of_the_samples() -> None:
    method = AlignProp(model(SHAPE), Brightness(), coefficient=2.0)
    draw = Draw.of(6)
    x = sample(method.model, source=Draw.of(6).normal(SHAPE))
    torch.testing.assert_close(method.loss(draw), -2 * x.mean())
    toward = AlignProp(model(SHAPE), Brightness(), loss="l1-target", target=3.0)
    wanted = (x.flatten(1).mean(1) - 3).abs().mean()
    torch.testing.assert_close(toward.loss(Draw.of(6)), wanted)


def test_checkpoints_change_no_bit_of_the_loss_gradient() -> None:
    """Invariant 2, for the loss as a whole: decoder, guidance and regularisers included."""
    decode = torch.nn.Linear(2, 2).requires_grad_(False)
    found = []
    for checkpoint in (True, False):
        method = AlignProp(
            model(SHAPE, classes=3), Brightness(), checkpoint=checkpoint, conditions=labels(),
            guided=lambda m: ClassifierFreeGuidance(m, 2.0), decode=decode, solver="sde", rank=0,
            regularizers=[RangePenalty(1.0), FieldDrift(0.1)],
        )  # fmt: skip
        method.loss(Draw.of(5)).backward()
        found.append(gradients(method.model))
    assert found[0].keys() == found[1].keys()
    assert found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_new_adapters_change_no_bit_and_scale_zero_takes_them_off() -> None:
    """Invariant 5."""
    base, x = model(SHAPE), noises(4, SHAPE)
    thin = gaussian_lora(base, 2)
    assert torch.equal(sample(thin, source=x), sample(base, source=x))
    spread = torch.cat([p.flatten() for n, p in thin.named_parameters() if "lora_A" in n]).std()
    assert spread.item() == pytest.approx(1 / 2, rel=0.2)
    _, trained = aligned()
    assert not torch.equal(sample(trained, source=x), sample(base, source=x))
    off = scale_adapter(base, trained, 0.0)
    assert torch.equal(sample(off, source=x), sample(base, source=x))


def test_new_adapters_of_embeddings_change_no_bit() -> None:
    base, label = model(SHAPE, classes=3), torch.tensor([0, 1, 2, 3])
    thin = gaussian_lora(base, 2, ["table"])
    names = [name for name, weight in thin.named_parameters() if weight.requires_grad]
    assert all("lora_embedding" in name for name in names)
    assert len(names) == 2
    x = noises(4, SHAPE)
    assert torch.equal(sample(thin, source=x, label=label), sample(base, source=x, label=label))


def test_base_weights_stay() -> None:
    """Invariant 9."""
    before = {n: p.clone() for n, p in model(SHAPE).named_parameters()}
    method, trained = aligned()
    assert all(torch.equal(p, before[n]) for n, p in method.reference.named_parameters())
    inside = dict(trained.net.net.named_parameters())
    for name, weight in before.items():
        stem, _, leaf = name.removeprefix("net.").rpartition(".")
        own = inside.get(f"{stem}.{leaf}", inside.get(f"{stem}.base_layer.{leaf}"))
        assert own is not None, name
        assert torch.equal(own, weight), name
    assert any(bool(p.any()) for n, p in inside.items() if "lora_B" in n)


def test_mixtures_are_linear_in_the_weights_and_exact_at_their_ends() -> None:
    base = model(SHAPE)
    ones = [
        Trainer(AlignProp(base, reward, rank=rank), settings()).fit()
        for reward, rank in ((Brightness(), 2), (lambda x: -x.flatten(1).mean(1), 3))
    ]
    x, t = noises(4, SHAPE), torch.full((4,), 0.5)
    for weights, one in (([1.0, 0.0], ones[0]), ([0.0, 1.0], ones[1])):
        end = mix_adapters(base, ones, weights)
        torch.testing.assert_close(end.velocity(x, t), merge_lora(one).velocity(x, t))
    half = mix_adapters(base, ones, [0.5, 0.5])
    for name, weight in half.net.state_dict().items():
        parts = [merge_lora(one).net.state_dict()[name] for one in ones]
        torch.testing.assert_close(weight, (parts[0] + parts[1]) / 2, atol=1e-6, rtol=1e-5)
    assert half.lineage[-1] == {"method": "adapter-mix", "weights": [0.5, 0.5]}
    with pytest.raises(ValueError, match="one weight a model"):
        mix_adapters(base, ones, [1.0])


@dataclass
class Spy:
    """A rule that notes what it is asked."""

    numbers: list[float] = field(default_factory=list)

    def first(self, steps: int, uniform: float) -> int:
        self.numbers.append(uniform)
        return Uniform().first(steps, uniform)


def test_one_cut_a_micro_batch() -> None:
    """Invariant 7: one draw each, and the micro-batches of a step draw their own."""
    spy = Spy()
    method = AlignProp(model(SHAPE), Brightness(), truncation=spy, steps=6)
    spy.numbers.clear()
    Trainer(method, settings(3, accumulate=2)).fit()
    assert len(spy.numbers) == 6
    assert len(set(spy.numbers)) == 6


def test_linear_model_and_quadratic_reward_rise_every_step() -> None:
    """Invariant 10."""
    flow = FlowModel(Linear(0.1, 0.0), shape=(2,), sampling={"solver": "euler", "steps": 4})
    method = AlignProp(flow, lambda x: -(x - 2).square().mean(1), truncation=Fixed(), rank=0)
    values = []
    optimizer = torch.optim.SGD(method.model.parameters(), 0.02)
    for _ in range(25):
        # The same noises in every step: descent, not an estimate of it.
        loss = method.loss(Draw.of(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss))
    assert all(after < before for before, after in itertools.pairwise(values))
    assert values[-1] < 0.6 * values[0]


def test_reward_of_a_class_rises_and_conditions_reach_it() -> None:
    def judge(images, label):
        return -(images.flatten(1).mean(1) - label.float()).square()

    base = model(SHAPE, classes=3)
    method = AlignProp(base, judge, conditions=labels(), truncation=Fixed(), rank=4)
    trained = Trainer(method, settings(60, rate=2e-2)).fit()
    x, label = noises(30, SHAPE), torch.arange(30) % 3
    before, after = (measure(m, {"r": judge}, x, label=label) for m in (base, trained))
    assert after["r"] > before["r"] / 2


def test_curve_early_stop_and_resume(tmp_path) -> None:
    base, x = model(SHAPE), noises(16, SHAPE)

    def train(folder, steps, stop_at=None):
        method = AlignProp(base, Brightness(), truncation=Normal())
        curve = RewardCurve(method, folder / "rewards.jsonl")
        callbacks = [curve]
        if stop_at is not None:
            callbacks.append(lambda trainer, step: step == stop_at and trainer.finish_early())
        trainer = Trainer(
            method, settings(6, checkpoint_every=2), folder=folder, callbacks=callbacks
        )
        return trainer.fit(resume=True), curve

    whole, curve = train(tmp_path / "whole", 6)
    assert [row["step"] for row in curve.rows] == [1, 2, 3, 4, 5, 6]
    assert {"reward", "gradient_steps"} <= curve.rows[0].keys()
    train(tmp_path / "cut", 6, stop_at=3)
    again, _ = train(tmp_path / "cut", 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    rows = (tmp_path / "whole/rewards.jsonl").read_text()
    assert rows == (tmp_path / "cut/rewards.jsonl").read_text()

    method = AlignProp(base, Brightness(), truncation=Fixed())
    # The held-out measure falls as the images brighten.
    stop = EarlyStop(lambda m: -abs(float(sample(m, source=x).mean()) - 0.3), every=1, patience=2)
    trained = Trainer(method, settings(200, rate=3e-2), callbacks=[stop]).fit()
    assert len(stop.values) < 200
    assert stop.best is not None
    assert float(-abs(sample(trained, source=x).mean() - 0.3)) == pytest.approx(stop.best[1])


def test_regularizers() -> None:
    base = model(SHAPE)
    other = model(SHAPE, seed=7)
    x, t = noises(4, SHAPE), torch.full((4,), 0.25)
    rollout = Rollout(3 * x, x, t, {}, other, base)
    torch.testing.assert_close(
        RangePenalty()(rollout), ((3 * x).abs() - 1).clamp(min=0).square().mean()
    )
    drift = FieldDrift()(rollout)
    torch.testing.assert_close(drift, (other.velocity(x, t) - base.velocity(x, t)).square().mean())
    drift.backward()
    assert all(p.grad is None for p in base.parameters())
    assert float(FieldDrift()(Rollout(x, x, t, {}, base, base))) == 0
    # They hold the model back.
    free = aligned(30)[1]
    held = aligned(30, regularizers=[FieldDrift(100.0)])[1]
    source = noises(32, SHAPE)
    start, far, near = (float(sample(m, source=source).mean()) for m in (base, free, held))
    assert near - start < 0.5 * (far - start)


def test_models_without_adapters_or_with_some() -> None:
    whole = AlignProp(model(SHAPE), Brightness(), rank=0)
    assert all(p.requires_grad for p in whole.model.parameters())
    thin = gaussian_lora(model(SHAPE), 2)
    again = AlignProp(thin, Brightness())
    assert again.model is not thin
    wanted = {n for n, p in again.model.named_parameters() if p.requires_grad}
    assert wanted
    assert all("lora_" in n for n in wanted)


def test_diversity_of_copies_is_zero() -> None:
    assert diversity(torch.ones(4, 1, 2, 2)) == 0
    with pytest.raises(ValueError, match="two or more"):
        diversity(torch.ones(1, 2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "l1-targt"}, "did you mean 'l1-target'"),
        ({"target": 1.0}, "give both or none"),
        ({"loss": "l1-target"}, "give both or none"),
        ({"coefficient": float("nan")}, "coefficient must be finite"),
        ({"truncation": LastK(9)}, "9 steps cannot carry gradient"),
        ({"rank": -1}, "rank must be >= 0"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"targets": ["nothing"]}, "no layer is called nothing"),
    ],
)
def test_errors(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignProp(model(SHAPE), Brightness(), **options)


def test_bad_rewards_are_named() -> None:
    def loss(reward):
        return AlignProp(model(SHAPE), reward).loss(Draw.of(4))

    with pytest.raises(ValueError, match=r"shape \(4,\), got \(\)"):
        loss(lambda x: x.mean())
    with pytest.raises(ValueError, match="reward of 4 of 4 images is NaN"):
        loss(lambda x: x.flatten(1).mean(1) * float("nan"))
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        loss(lambda x: x.detach().flatten(1).mean(1))
    with pytest.raises(ValueError, match="needs the condition 'label'"):
        loss(lambda x, label: x.flatten(1).mean(1))
    with pytest.raises(ValueError, match="must return a tensor, got float"):
        loss(lambda x: 1.0)
    with pytest.raises(ValueError, match="must be callable"):
        loss(3)
