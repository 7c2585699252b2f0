"""Data sets from disk and parquet tables: columns, splits, bad rows."""

from __future__ import annotations

import numpy as np
import pytest
from tests.training.data.pictures import coloured

from rectiflow.training.data import load

PINNED = [2, 3, 11, 13]  # the test rows of 20, as in test_data.py


@pytest.fixture
def dataset():
    import datasets

    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=["even", "odd"]),
            "image": datasets.Image(),
            "text": datasets.Value("string"),
        }
    )
    rows = [
        {"label": i % 2, "text": f"number {i}", "image": {"bytes": content, "path": None}}
        for i, content in enumerate(coloured(20).values())
    ]
    return datasets.Dataset.from_list(rows, features=features)


def check_table(spec, **options):
    whole, test = (load(spec, split=split, **options) for split in ("all", "test"))
    assert test.images[:, 0, 0, 0].tolist() == PINNED
    assert sorted(whole.images[:, 0, 0, 0].tolist()) == list(range(20))
    for data in (whole, test):
        red = data.images[:, 0, 0, 0].astype(int)
        assert data.classes == ("even", "odd")
        assert (data.labels == red % 2).all()
        assert data.captions == tuple(f"number {i}" for i in red)


def test_hub_from_disk_and_parquet(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    check_table(f"hub:{tmp_path / 'saved'}")
    check_table(f"hub:{tmp_path / 'saved'}", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    dataset.to_parquet(tmp_path / "one.parquet")
    check_table(f"parquet:{tmp_path / 'one.parquet'}")


def test_hub_own_split(dataset, tmp_path):
    import datasets

    parts = datasets.DatasetDict(
        {"train": dataset.select(range(15)), "validation": dataset.select(range(15, 20))}
    )
    parts.save_to_disk(str(tmp_path / "parts"))
    test = load(f"hub:{tmp_path / 'parts'}", split="test")
    assert test.images[:, 0, 0, 0].tolist() == [15, 16, 17, 18, 19]
    assert len(load(f"hub:{tmp_path / 'parts'}")) == 15
    for one, rows in parts.items():
        name = {"train": "train", "validation": "test"}[one]
        rows.to_parquet(tmp_path / "files" / f"{name}-00000.parquet")
    test = load(f"parquet:{tmp_path / 'files'}", split="test")
    assert test.images[:, 0, 0, 0].tolist() == [15, 16, 17, 18, 19]


def write_parquet(path, **columns):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return f"parquet:{path}"


def test_parquet_of_plain_bytes_with_bad_rows(tmp_path):
    content = [*coloured(3).values(), b"junk", None]
    spec = write_parquet(tmp_path / "a.parquet", picture=content, label=["b", "a", "b", "a", "a"])
    with pytest.warns(UserWarning, match=r"skipped 2 in parquet:a: row 3 \(not an image\), row 4"):
        data = load(spec, split="all")
    labels = dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist()))
    assert labels == {0: 1, 1: 0, 2: 1}
    assert data.classes == ("a", "b")


def test_parquet_of_numbers(tmp_path):
    import pyarrow as pa

    spec = write_parquet(tmp_path / "a.parquet", x=[[0.5, -1.0], [1.0, 0.25]])
    assert load(spec, split="all").images.tolist() == [[[[0.5]], [[-1.0]]], [[[1.0]], [[0.25]]]]
    grey = pa.array([[[[0, 255]]], [[[7, 8]]]], pa.list_(pa.list_(pa.list_(pa.uint8()))))
    data = load(write_parquet(tmp_path / "b.parquet", image=grey), split="all")
    assert data.images.dtype == np.uint8
    assert data.images.tolist() == [[[[0, 255]]], [[[7, 8]]]]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"x": [[0.5], [float("nan")]]}, "parquet:a has NaN or infinity in row 1"),
        ({"x": [[0.5], [None]]}, "NaN or infinity in row 1"),
        ({"x": [[0.5], None]}, "no regular list of numbers in row 1"),
        ({"x": [[0.5], [0.5, 0.5]]}, r"shape \(2,\) in row 1 and \(1,\) before"),
        ({"x": [[0.5], [3.0]]}, "values from 3 to 3 in row 1"),
        ({"x": [1, 2]}, r"no column of images .* its columns are x \(int64\)"),
        ({"image": [b"a"], "label": [-1]}, "label -1 in row 0"),
        ({"image": [b"a", b"b"], "label": [0, None]}, "no value of label in row 1"),
        ({"image": [b""]}, "no readable image in parquet:a"),
    ],
)
def test_bad_parquet(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        load(write_parquet(tmp_path / "a.parquet", **columns))


def test_missing_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.parquet file in"):
        load(f"parquet:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(f"parquet:{tmp_path / 'a.parquet'}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no readable parquet file"):
        load(f"parquet:{tmp_path / 'a.parquet'}")
