"""The straightening report: known losses and gaps, the rule of another round, the pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rectiflow.distill import Profile, Straightening, generate_pairs, profile
from rectiflow.distill.straightening import loss_by_time
from rectiflow.flows import (
    CosinePath,
    FlowModel,
    GaussianField,
    PairedGaussian,
    Pairs,
    RectifiedPath,
)


def noise(count, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def spread(z):
    return float((z - z.mean(0)).square().mean().sqrt())


def ramp(x, t):
    """v = 2 t in every dimension: the flow adds 1, and the velocity's variance is known."""
    return (2 * t)[:, None].expand_as(x)


def made(**changes):
    base = Profile((0.25, 0.75), (1.0, 1.0), (0.5, 0.5), 0.5, 0.2, 0.1, 50, 1)
    return dataclasses.replace(base, **changes)


def test_loss_of_a_known_field_by_time():
    # The pairs want v = 1, so the loss is the mean of (2 t - 1)² over each bin.
    z = noise(4000)
    found = loss_by_time(FlowModel(ramp), z, z + 1, 2)
    torch.testing.assert_close(found, torch.full((2,), 1 / 3).double(), rtol=1e-3, atol=0)
    ends = loss_by_time(FlowModel(ramp), z, z + 1, 4).tolist()
    assert ends == pytest.approx([7 / 12, 1 / 12, 1 / 12, 7 / 12], rel=1e-2)


def test_gap_is_the_variance_of_the_velocity():
    z = noise(64)
    found = profile(FlowModel(ramp), Pairs(z, z + 1), bins=4, steps=400)
    # Over all time (2 t - 1)² has mean 1/3; Euler's steps see it at their starts.
    assert found.straightness == pytest.approx(1 / 3, rel=0.02)
    assert found.gap == pytest.approx([7 / 12, 1 / 12, 1 / 12, 7 / 12], rel=0.06)
    assert found.times == (0.125, 0.375, 0.625, 0.875)
    # One step from t = 0 stays where it is: it misses the end by 1 in every dimension.
    assert found.one_step == pytest.approx(1 / spread(z), rel=0.01)
    assert found.missed < 0.01


def test_missed_pairs_are_measured():
    z = noise(64)
    still = FlowModel(lambda x, t: torch.zeros_like(x))
    found = profile(still, Pairs(z, z + 0.5), steps=10)
    assert found.missed == pytest.approx(0.5 / spread(z), rel=1e-5)
    assert found.one_step == 0


def test_steps_are_rounded_to_bins_and_stores_are_read(tmp_path: Path):
    model = FlowModel(lambda x, t: torch.ones_like(x), shape=(2,), lineage=[{"method": "reflow"}])
    store = generate_pairs(model, tmp_path, 100, steps=1)
    found = profile(model, store, bins=4, steps=10, count=50)
    assert found.steps == 12
    assert found.rounds == 1
    assert max(found.loss) < 1e-9


def test_conditions_go_along():
    def push(x, t, label):
        return label[:, None].to(x).expand_as(x)

    z, label = noise(40), torch.arange(40) % 3
    pairs = Pairs(z, z + label[:, None], {"label": label})
    found = profile(FlowModel(push), pairs, steps=10, count=20)
    assert max(found.loss) < 1e-9


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_exact_first_order_flow_on_a_curved_path_has_nothing_left_to_gain(prediction):
    mean, std, path = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]), CosinePath()
    field, z = PairedGaussian(mean, std, path), noise(256)
    pairs = Pairs(z, mean + std * z)
    output = {"velocity": field.velocity, "data": field.denoise}[prediction]
    found = profile(FlowModel(output, path, prediction), pairs, steps=20)
    # Rounding of float32 only; Euler's one step would miss by about the spread.
    assert found.one_step < 1e-4
    assert found.missed < 1e-4
    assert found.straightness < 1e-6
    assert max(found.gap) < 1e-5
    assert found.measure == "the first-order gap"
    bent = profile(FlowModel(GaussianField(mean, std, path).velocity, path), pairs, steps=20)
    report = Straightening(bent, found)
    assert "the first-order gap fell from" in report.sentence
    assert bent.straightness > 0.01
    assert Straightening(found, bent).another_round


def test_sentence_says_which_way_the_measure_went():
    flat, bent = made(straightness=1.0), made(straightness=2.0)
    assert "S rose from 1 to 2 a dimension" in Straightening(flat, bent).sentence
    curved = made(straightness=0.25, measure="the first-order gap")
    mixed = Straightening(curved, flat).sentence
    assert "the first-order gap was 0.25 and S is 1 a dimension" in mixed


@pytest.mark.parametrize("path", [RectifiedPath(), CosinePath()])
def test_pairs_are_measured_in_batches(path):
    sizes, z = [], noise(50)

    def seen(x, t, label):
        sizes.append(len(x))
        return label[:, None].to(x).expand_as(x)

    pairs = Pairs(z, z + 1, {"label": torch.ones(50, dtype=torch.int64)})
    whole = profile(FlowModel(seen, path), pairs, steps=10)
    assert max(sizes) == 50
    sizes.clear()
    parts = profile(FlowModel(seen, path), pairs, steps=10, batch_size=16)
    assert max(sizes) == 16
    assert parts.loss == pytest.approx(whole.loss)
    assert parts.gap == pytest.approx(whole.gap)
    assert parts.one_step == pytest.approx(whole.one_step)


@pytest.mark.parametrize(
    "after, wanted, words",
    [
        ({"one_step": 0.2, "missed": 0.1}, True, "another round would help"),
        ({"one_step": 0.05, "missed": 0.1}, False, "would add more error than it removes"),
        ({"one_step": 0.2, "missed": 0.1, "rounds": 3}, False, "3 rounds are done, distil"),
        ({"one_step": float("nan"), "missed": 0.1}, False, "would add more error"),
    ],
)
def test_another_round_pays_while_one_step_loses_more_than_a_round(after, wanted, words):
    report = Straightening(made(straightness=4.0, one_step=0.9, rounds=0), made(**after))
    assert report.another_round is wanted
    assert words in report.sentence
    assert "S fell from 4 to 0.5 a dimension" in report.sentence


def test_table_and_pictures(tmp_path: Path):
    report = Straightening(made(loss=(2.0, 3.0)), made(gap=(0.1, 0.2)))
    assert report.rows() == [[0.25, 2.0, 1.0, 0.5, 0.1], [0.75, 3.0, 1.0, 0.5, 0.2]]
    pictures = report.draw(tmp_path)
    assert len(pictures) == 2
    for file, caption in pictures.items():
        assert file.read_bytes().startswith(b"\x89PNG")
        assert "before the round" in caption
    assert "2.5 on average before the round, 1 after" in next(iter(pictures.values()))


def test_bad_input():
    model = FlowModel(ramp)
    with pytest.raises(ValueError, match="bins must be > 0"):
        profile(model, Pairs(noise(4), noise(4)), bins=0)
    with pytest.raises(ValueError, match="two pairs or more, got 1"):
        profile(model, Pairs(noise(1), noise(1)))
