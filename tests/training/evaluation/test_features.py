"""Feature nets: good enough to judge digits, deterministic, and safe to cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rectiflow.errors import MissingExtraError
from rectiflow.training.evaluation import feature_net
from rectiflow.training.evaluation import features as module
from rectiflow.training.evaluation.features import load_features
from rectiflow.training.evaluation.frechet import Moments, frechet_distance


class Digits:
    """scikit-learn's digits with the attributes of a data set."""

    name = slug = "digits"
    classes = tuple("0123456789")

    def __init__(self, part: slice, *, labelled: bool = True) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))[part]
        self.images = (digits.images[order] / 8 - 1).astype(np.float32)[:, None]
        self.labels = digits.target[order] if labelled else None

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.images[np.asarray(indices)])

    def __len__(self) -> int:
        return len(self.images)

    def all(self) -> torch.Tensor:
        return self.batch(np.arange(len(self)))


TRAIN, TEST = slice(1437), slice(1437, None)
FEW = slice(200)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Features of all digits, and the cache they lie in."""
    cache = tmp_path_factory.mktemp("cache")
    before = torch.get_rng_state()
    features = load_features(Digits(TRAIN), Digits(TEST), cache=cache)
    assert torch.equal(torch.get_rng_state(), before)
    return features, cache


def never(*args, **kwargs):
    raise AssertionError("the cache was not used")


def test_the_classifier_knows_digits_and_sees_noise(cached):
    features, _ = cached
    assert (features.name, features.dimension) == ("fd_digits", 32)
    assert features.accuracy >= 0.97
    train, test = (features(Digits(part).all()) for part in (TRAIN, TEST))
    noise = torch.randn(360, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    floor = frechet_distance(Moments.of(train), Moments.of(test))
    assert frechet_distance(Moments.of(train), Moments.of(features(noise))) > 10 * floor
    # Centred, with average variance one.
    assert train.mean(0).abs().max() < 1e-4
    assert train.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_cache_hit_is_bit_identical_and_trains_nothing(cached, monkeypatch):
    features, cache = cached
    monkeypatch.setattr(module, "fit", never)
    again = load_features(Digits(TRAIN), Digits(TEST), cache=cache)
    images = Digits(TEST).all()
    assert torch.equal(again(images), features(images))
    assert again.accuracy == features.accuracy
    with pytest.raises(AssertionError, match="not used"):
        load_features(Digits(TRAIN), Digits(FEW), cache=cache)  # other data, other key


@pytest.mark.parametrize("damage", ["truncated", "absent", "not json", "other config"])
def test_a_damaged_cache_is_replaced(tmp_path, damage):
    data = Digits(FEW, labelled=False)
    good = load_features(data, data, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    weights, record = folder / "net.safetensors", folder / "features.json"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:100])
    elif damage == "absent":
        weights.unlink()
    elif damage == "not json":
        record.write_text("{")
    else:
        fields = json.loads(record.read_text())
        fields["config"]["shape"] = [3, 32, 32]
        record.write_text(json.dumps(fields))
    again = load_features(data, data, cache=tmp_path)
    assert torch.equal(again(data.all()), good(data.all()))
    assert weights.read_bytes() == whole


def test_training_is_deterministic_under_a_seed(monkeypatch):
    monkeypatch.setattr(feature_net, "STEPS", 20)
    train, test = Digits(FEW), Digits(slice(200, 300))
    steps = []
    first, second, other = (
        load_features(train, test, seed=s, progress=lambda i, n: steps.append((i, n)))
        for s in (3, 3, 4)
    )
    assert torch.equal(first(test.all()), second(test.all()))
    assert not torch.equal(first(test.all()), other(test.all()))
    assert steps[0][0] == 1
    assert steps[-1][0] == steps[-1][1]


def test_data_without_labels_get_random_features():
    data = Digits(FEW, labelled=False)
    features = load_features(data, data)
    assert (features.name, features.accuracy) == ("fd_random_digits", None)
    assert features(data.all()[:0]).shape == (0, 32)
    with pytest.raises(ValueError, match="no labels"):
        load_features(data, data, kind="classifier")


def test_bad_arguments_are_named(tmp_path):
    data = Digits(FEW, labelled=False)
    with pytest.raises(ValueError, match="did you mean 'random'"):
        load_features(data, data, kind="randon")
    with pytest.raises(ValueError, match=r"shape \(b, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        load_features(data, data)(torch.zeros(2, 3, 8, 8))


def test_inception_needs_its_package_and_its_weights(monkeypatch):
    data = Digits(FEW)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"rectiflow\[fid\]"):
        load_features(data, data, kind="inception:weights.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at weights\.pth"):
        load_features(data, data, kind=f"inception:{Path('weights.pth')}")
