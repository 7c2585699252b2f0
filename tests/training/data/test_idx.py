"""IDX files and Fashion-MNIST: bytes by hand, places, faults."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from tests.training.data.pictures import write_folder

from rectiflow.training.data import load
from rectiflow.training.data.idx import DEBIAN, read_idx


def idx(values):
    values = np.asarray(values, np.uint8)
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return head + values.tobytes()


def test_idx_by_hand(tmp_path):
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 20, 30, 40, 50, 60])
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    for name in ("a", "a.gz"):
        assert read_idx(tmp_path / name).tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a", b"", "starts with nothing"),
        ("a", b"\x89PNG....", "starts with 89 50 4e 47, expected 00 00 08"),
        ("a", b"\0\0\x0d\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        ("a", b"\0\0\x08\x03\0\0", "truncated in its header"),
        ("a", idx([[1, 2], [3, 4]])[:-1], r"truncated: 4 bytes .* shape \(2, 2\), found 3"),
        ("a", idx([1, 2]) + b"x", "longer than it says"),
        ("a", b"\0\0\x08\x03" + b"\xff" * 12 + b"x", "truncated"),  # must not reserve 2^96 bytes
        ("a.gz", gzip.compress(idx(range(200)))[:-20], "truncated or damaged"),
        ("a.gz", idx([1, 2]), "truncated or damaged"),
    ],
)
def test_bad_idx(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


@pytest.fixture
def garments(tmp_path):
    random = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 6), ("t10k", 3)):
        files[f"{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(np.arange(count)))
    return write_folder(tmp_path / "garments", files)


def test_fashion_mnist_places(garments, monkeypatch):
    train = load(f"fashion-mnist:{garments}")
    assert train.shape == (1, 28, 28)
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert train.classes[9] == "Ankle boot"
    test = load("fashion-mnist", folder=garments, split="test")
    monkeypatch.setenv("RECTIFLOW_DATA", str(garments))
    whole = load("fashion-mnist", split="all")
    assert (whole.images == np.concatenate([train.images, test.images])).all()


def test_fashion_mnist_pads_to_32_and_resizes_beyond(garments):
    plain = load(f"fashion-mnist:{garments}")
    padded = load(f"fashion-mnist:{garments}", size=32)
    assert padded.shape == (1, 32, 32)
    assert (padded.images[:, :, 2:-2, 2:-2] == plain.images).all()
    assert padded.images[:, :, :2].max() == padded.images[:, :, :, -2:].max() == 0
    assert load(f"fashion-mnist:{garments}", size=14, channels=3).shape == (3, 14, 14)


def test_fashion_mnist_faults(garments, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte or .* in .*/nowhere/"):
        load(f"fashion-mnist:{tmp_path / 'nowhere'}")
    monkeypatch.setattr("rectiflow.training.data.idx.DEBIAN", tmp_path / "nowhere")
    monkeypatch.delenv("RECTIFLOW_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="install the Debian package dataset-fashion-mnist"):
        load("fashion-mnist")
    for labels, message in (([1, 2], "6 train images and 2 labels"), ([11] * 6, "label 11")):
        (garments / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        with pytest.raises(ValueError, match=message):
            load(f"fashion-mnist:{garments}")
    (garments / "train-images-idx3-ubyte").write_bytes(idx([1, 2]))
    with pytest.raises(ValueError, match="has 1 dimensions, expected 3"):
        load(f"fashion-mnist:{garments}")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package is not installed")
def test_the_real_fashion_mnist():
    data = load("fashion-mnist", split="test")
    assert data.images.shape == (10000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [1000] * 10
    # an ankle boot, the first image: empty above, bright in its sole
    assert data.labels[0] == 9
    assert data.images[0, 0, :7].max() == 0
