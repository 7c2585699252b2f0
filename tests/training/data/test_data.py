"""Data by spec string: splits, arrays, photographs, the record, faults of the spec."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.data.pictures import coloured, write_folder

from rectiflow.training.data import SOURCES, ImageData, load, parse
from rectiflow.training.data.photos import PHOTOS, _open, _tiles, crop_boxes
from rectiflow.training.data.splits import held_out


def test_split_mask_is_pinned():
    # these very rows on every machine and version: a model's test images must stay unseen
    assert np.flatnonzero(held_out(20)).tolist() == PINNED
    assert [int(held_out(n).sum()) for n in (0, 1, 2, 3, 10)] == [0, 0, 0, 1, 2]


PINNED = [2, 3, 11, 13]


def test_folder_split_is_disjoint_complete_and_repeatable(tmp_path):
    folder = f"folder:{write_folder(tmp_path / 'a', coloured(20))}"
    red = {s: load(folder, split=s).images[:, 0, 0, 0].tolist() for s in ("train", "test", "all")}
    assert red["test"] == PINNED
    assert red["all"] == red["train"] + red["test"]
    assert sorted(red["all"]) == list(range(20))


def test_digits_are_sklearns_and_split_once():
    from sklearn.datasets import load_digits

    raw = load_digits()
    whole, train, test = (load("digits", split=s) for s in ("all", "train", "test"))
    assert (len(train), len(test), len(whole)) == (1438, 359, 1797)
    assert whole.images.dtype == np.float32
    # x / 8 - 1 of integers 0..16 is exact in binary
    assert (whole.images[:, 0] * 8 + 8 == raw.images).all()
    assert (whole.labels == raw.target).all()
    assert whole.batch([3]).min() == -1.0
    mask = held_out(1797)
    assert (train.images == whole.images[~mask]).all()
    assert (test.labels == whole.labels[mask]).all()


def test_too_small_a_split_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "one", coloured(1))
    assert len(load(f"folder:{folder}")) == 1
    with pytest.raises(ValueError, match=r"the test split of folder:one is empty"):
        load(f"folder:{folder}", split="test")


def test_photo_crops_of_train_and_test_share_no_pixel():
    for seed, shape in enumerate([(451, 300), (1411, 1411), (600, 400)]):
        train, test = (crop_boxes(shape, 32, 300, p, seed=seed) for p in ("train", "test"))
        for left, top, right, bottom in test:
            assert all(
                right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in train
            )  # fmt: skip
        inside = np.array(train + test)
        assert inside.min() >= 0
        assert (inside[:, 2] <= shape[0]).all()
        assert (inside[:, 3] <= shape[1]).all()
        sides = inside[:, 2] - inside[:, 0]
        assert (sides == inside[:, 3] - inside[:, 1]).all()
        assert sides.min() >= 32
        tiles = _tiles(shape, 32, seed)
        assert sides.max() <= min(tiles.side, 128)
        assert sorted(tiles.test) == list(range(5))


def test_photos_are_crops_of_the_photographs(monkeypatch):
    monkeypatch.setattr("rectiflow.training.data.photos.TRAIN", 40)
    monkeypatch.setattr("rectiflow.training.data.photos.TEST", 20)
    data, again = load("photos"), load("photos")
    assert (len(data), data.shape, len(data.classes)) == (40, (3, 32, 32), 10)
    assert np.bincount(data.labels).tolist() == [4] * 10
    assert (data.images == again.images).all()
    assert len(load("photos", split="all", size=16, channels=1)) == 60
    # the first cat is the photograph's own pixels there
    cat = _open("cat", "RGB")
    left, top, right, bottom = crop_boxes(cat.size, 32, 1, "train", seed=list(PHOTOS).index("cat"))[
        0
    ]
    pixels = np.asarray(cat)[top:bottom, left:right].reshape(-1, 3)
    shown = data.images[data.labels == data.classes.index("cat")][0].reshape(3, -1)
    # Lanczos keeps the mean up to rounding and clipping
    assert np.abs(pixels.mean(0) - shown.mean(1)).max() < 2


def test_photos_too_large():
    with pytest.raises(ValueError, match="at most half of a photograph's side, got 2000"):
        load("photos", size=2000)


@pytest.mark.parametrize(
    "values, shape",
    [
        (np.zeros((10, 3, 4, 5), np.uint8), (3, 4, 5)),
        (np.zeros((10, 4, 5), ">f4"), (1, 4, 5)),
        (np.zeros((10, 2), np.float64), (2, 1, 1)),
        (np.zeros((10, 2), np.float16), (2, 1, 1)),
    ],
)
def test_npy_shapes(tmp_path, values, shape):
    np.save(tmp_path / "a.npy", values)
    data = load(f"npy:{tmp_path / 'a.npy'}", split="all")
    assert data.shape == shape
    assert len(load(f"npy:{tmp_path / 'a.npy'}")) == 8
    assert data.batch([0]).dtype == torch.float32


@pytest.mark.parametrize(
    "values, message",
    [
        (np.where(np.arange(12).reshape(6, 2) == 9, np.nan, 0), r"a\.npy has NaN .* row 4"),
        (np.where(np.arange(12).reshape(6, 2) == 6, np.inf, 0), "row 3"),
        (
            np.arange(12.0).reshape(6, 2) / 5,
            r"values from 0\.8 to 1 in row 2|1\.2 to 1\.4 in row 3",
        ),
        (np.zeros((6, 2), np.int64), "holds int64: expected uint8 or floats"),
        (np.zeros(6), r"shape \(6,\): expected"),
        (np.zeros((0, 2)), "there are no values"),
        (np.array([{}]), "not a readable .npy array"),
    ],
)
def test_bad_npy(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        load(f"npy:{tmp_path / 'a.npy'}", split="all")


def test_npy_out_of_range_beyond_the_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("rectiflow.training.data.arrays.CHUNK", 2)
    values = np.zeros((7, 2), np.float32)
    values[5, 1] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="row 5"):
        load(f"npy:{tmp_path / 'a.npy'}")
    np.save(tmp_path / "a.npy", np.zeros((7, 1, 4, 6), np.uint8))
    assert load(f"npy:{tmp_path / 'a.npy'}", size=2, split="all").images.shape == (7, 1, 2, 2)


def test_truncated_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((100, 2)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        load(f"npy:{tmp_path / 'a.npy'}")


def test_array_resize_keeps_a_constant_and_the_mean():
    data = load("digits", split="test", size=4)
    whole = load("digits", split="test")
    assert data.shape == (1, 4, 4)
    # bicubic halving keeps the mean of the inner pixels; edges weigh a little more
    assert abs(data.images.mean() - whole.images.mean()) < 0.05
    colour = load("digits", split="test", channels=3)
    assert (colour.images == whole.images).all()


@pytest.fixture
def record():
    images = np.arange(6 * 3, dtype=np.uint8).reshape(6, 3, 1, 1) * 15
    labels = np.array([0, 1, 2, 0, 1, 2], np.int64)
    return ImageData("toy: a/b", images, labels, ("a", "b", "c"), tuple("uvwxyz"))


def test_batch_and_condition(record):
    batch = record.batch(torch.tensor([5, 0]))
    # 255 is 1 and 0 is -1, exactly
    assert batch[0, 2, 0, 0] == 1.0
    assert batch[1, 0, 0, 0] == -1.0
    assert torch.equal(batch, record.batch(np.array([5, 0])))
    before = record.images.copy()
    batch.zero_()
    assert (record.images == before).all()
    assert record.condition([5, 0])["label"].tolist() == [2, 0]
    assert record.condition([5, 0])["label"].dtype == torch.int64
    unlabelled = ImageData("x", record.images, None, (), None)
    assert unlabelled.condition([0]) == {}
    assert record.slug == "toy-a-b"
    with pytest.raises(IndexError):
        record.batch([6])


def test_subset(record):
    some = record.subset(torch.tensor([4, 1]))
    assert (some.images == record.images[[4, 1]]).all()
    assert some.labels.tolist() == [1, 1]
    assert some.captions == ("y", "v")
    assert np.shares_memory(record.subset(range(2, 4)).images, record.images)
    assert record.subset(np.array([True, False] * 3)).captions == ("u", "w", "y")
    assert len(record.subset([])) == 0
    with pytest.raises(IndexError):
        record.subset(range(4, 7))


def test_only(record):
    some = record.only("c", 0)
    assert some.classes == ("c", "a")
    assert some.captions == ("u", "w", "x", "z")
    assert some.labels.tolist() == [1, 0, 1, 0]
    for wrong, message in (
        (("d",), "unknown class 'd'"),
        ((3,), "class index must be 0..2, got 3"),
        ((), "one or more different"),
        (("a", 0), "one or more different"),
    ):
        with pytest.raises(ValueError, match=message):
            record.only(*wrong)
    with pytest.raises(ValueError, match="no labels"):
        ImageData("x", record.images, None, (), None).only("a")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": np.zeros((2, 3), np.uint8)}, r"must be \(n, c, h, w\)"),
        ({"images": np.zeros((2, 1, 1, 1))}, "got float64"),
        ({"labels": np.zeros(3, np.int64)}, r"int64 of shape \(2,\)"),
        ({"labels": np.array([0, 5])}, "outside its 1 classes"),
        ({"captions": ("a",)}, "2 images and 1 captions"),
    ],
)
def test_record_checks_itself(change, message):
    whole = {
        "name": "x",
        "images": np.zeros((2, 1, 1, 1), np.uint8),
        "labels": np.zeros(2, np.int64),
        "classes": ("a",),
        "captions": None,
    }
    with pytest.raises(ValueError, match=message):
        ImageData(**(whole | change))


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("digit", {}, "unknown data 'digit': did you mean 'digits'"),
        ("digits:8", {}, "digits takes nothing after a colon"),
        ("folder", {}, "folder needs a path"),
        ("hub:", {}, "hub needs a name"),
        ("digits", {"split": "tets"}, "unknown split 'tets': did you mean 'test'"),
        ("digits", {"size": 0}, "size must be > 0, got 0"),
        ("digits", {"channels": 2}, "channels must be 1 or 3, got 2"),
        ("digits", {"folder": "x"}, "folder= is for fashion-mnist"),
    ],
)
def test_bad_specs(spec, options, message):
    with pytest.raises(ValueError, match=message):
        load(spec, **options)


def test_a_bare_folder_is_recognised(tmp_path):
    with pytest.raises(ValueError, match=f"did you mean 'folder:{tmp_path}'"):
        load(str(tmp_path))


def test_every_source_has_a_loader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, source in SOURCES.items():
        if source.argument in ("PATH", "NAME"):
            assert parse(f"{kind}:a:b") == (kind, "a:b")
        if source.argument == "PATH":
            with pytest.raises(FileNotFoundError):
                load(f"{kind}:nowhere")


def test_import_is_light():
    heavy = ("PIL", "sklearn", "skimage", "datasets", "pyarrow")
    code = f"import sys, rectiflow.training.data; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_good_data_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(f"folder:{write_folder(tmp_path, coloured(3))}")
