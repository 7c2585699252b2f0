"""Tables with a picture column, as Hugging Face data sets and parquet files hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rectiflow.training.data.arrays import as_images, reshape
from rectiflow.training.data.decoding import Settings, decode_split
from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.pictures import Source
from rectiflow.training.data.splits import choose, held_out

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = ("image", "img", "picture", "jpg", "png", "pixel_values", "x")
LABELS = ("label", "labels", "class", "fine_label")
TEXTS = ("text", "caption")


@dataclass(frozen=True)
class Part:
    """Some rows of a table: `read(columns)` gives them in order as record batches."""

    rows: int
    read: Callable[[list[str]], Iterator[Any]]
    is_test: bool = False


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and the class names that the table's features tell."""

    picture: str
    numbers: Literal["uint8", "float32"] | None  # None: encoded pictures
    label: str | None
    names: tuple[str, ...]
    text: str | None


@dataclass(frozen=True)
class Pictures:
    """The pictures of all parts as (row, bytes or file), read anew at each iteration."""

    parts: list[Part]
    column: str
    root: Path

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def __iter__(self) -> Iterator[tuple[str, Source]]:
        for row, cell in enumerate(_cells(self.parts, self.column)):
            path = cell.get("path") if isinstance(cell, dict) else None
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if content is None and path is not None:
                content = self.root / path
            yield f"row {row} ({path})" if path else f"row {row}", content


def load_table(
    name: str,
    schema: pa.Schema,
    parts: list[Part],
    stamp: Any,
    *,
    split: str,
    settings: Settings,
    root: Path,
) -> ImageData:
    """One split of a table of pictures or of numbers in lists.

    Args:
        name: name of the data.
        schema: columns, with Hugging Face's description of the features if there is one.
        parts: the rows; if no part is for testing, a fixed fifth of the rows is.
        stamp: JSON value that changes with the table.
        split: train, test or all.
        settings: size, channels, cache and progress.
        root: folder that relative file names in the table start from.

    Raises:
        ValueError: if there is no picture column, a label is missing or out of range, or the
            numbers have NaN, infinity or values out of [-1, 1].
    """
    columns = find_columns(name, schema)
    count = sum(part.rows for part in parts)
    if not count:
        raise ValueError(f"{name} has no rows")
    test = np.concatenate([np.full(part.rows, part.is_test) for part in parts])
    if test.all() or not test.any():
        test = held_out(count)
    labels, classes = None, columns.names
    if columns.label is not None:
        labels, classes = _labels(name, list(_cells(parts, columns.label)), columns)
    captions = None
    if columns.text is not None:
        captions = [text or "" for text in _cells(parts, columns.text)]
    if columns.numbers is None:
        return decode_split(
            name,
            Pictures(parts, columns.picture, root),
            stamp,
            split=split,
            test=test,
            settings=settings,
            labels=labels,
            classes=classes,
            captions=captions,
        )
    values = _numbers(name, parts, columns)
    data = ImageData(
        name,
        reshape(values, size=settings.size, channels=settings.channels),
        labels,
        classes,
        None if captions is None else tuple(captions),
    )
    return data if split == "all" else data.subset(choose(test, split))


def find_columns(name: str, schema: pa.Schema) -> Columns:
    """The picture column and, if there are any, the label and caption columns."""
    import pyarrow as pa

    features = _features(schema)
    kinds = {column: features.get(column, {}).get("_type") for column in schema.names}
    types = {column: schema.field(column).type for column in schema.names}

    def first(likely: tuple[str, ...], fits: Callable[[str], bool]) -> str | None:
        ordered = [n for n in likely if n in types] + [n for n in types if n not in likely]
        return next((column for column in ordered if fits(column)), None)

    picture = first(PICTURES, lambda c: kinds[c] == "Image" or _is_encoded(types[c]))
    numbers = None
    if picture is None and (picture := first(PICTURES, lambda c: bool(_numbers_in(types[c])))):
        numbers = _numbers_in(types[picture])
    if picture is None:
        found = ", ".join(f"{column} ({kind})" for column, kind in types.items())
        raise ValueError(
            f"{name} has no column of images (bytes, or a struct with bytes) or of lists of "
            f"numbers; its columns are {found}"
        )
    label = first(LABELS, lambda c: kinds[c] == "ClassLabel") or first(
        (), lambda c: c in LABELS and (pa.types.is_integer(types[c]) or _is_text(types[c]))
    )
    text = first((), lambda c: c in TEXTS and _is_text(types[c]) and c != label)
    names = tuple(features.get(label, {}).get("names") or ()) if label else ()
    return Columns(picture, numbers, label, names, text)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The features that Hugging Face's writer left in the table's metadata."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: one for name, one in described.items() if isinstance(one, dict)}


def _is_encoded(kind: pa.DataType) -> bool:
    """Bytes, or a struct that has them, as an encoded picture is kept."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _numbers_in(kind: pa.DataType) -> Literal["uint8", "float32"] | None:
    """What lists, however deep, hold: unsigned bytes, floats or neither."""
    import pyarrow.types as types

    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth and types.is_uint8(kind):
        return "uint8"
    return "float32" if depth and types.is_floating(kind) else None


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _cells(parts: list[Part], column: str) -> Iterator[Any]:
    """The values of one column, row by row."""
    for part in parts:
        for batch in part.read([column]):
            yield from batch.column(column).to_pylist()


def _labels(name: str, cells: list[Any], columns: Columns) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices and names; texts become classes in sorted order."""
    missing = next((row for row, cell in enumerate(cells) if cell is None), None)
    if missing is not None:
        raise ValueError(f"{name} has no value of {columns.label} in row {missing}")
    if isinstance(cells[0], str):
        classes = tuple(sorted(set(cells)))
        index = {one: i for i, one in enumerate(classes)}
        return np.array([index[cell] for cell in cells], np.int64), classes
    labels = np.array(cells, np.int64)
    names = columns.names or tuple(str(i) for i in range(max(0, int(labels.max())) + 1))
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise ValueError(
            f"{name} has {columns.label} {labels[outside[0]]} in row {outside[0]}: "
            f"expected 0..{len(names) - 1}"
        )
    return labels, names


def _numbers(name: str, parts: list[Part], columns: Columns) -> np.ndarray:
    """A column of lists of numbers as checked images."""
    rows: list[np.ndarray] = []
    for row, cell in enumerate(_cells(parts, columns.picture)):
        try:
            rows.append(np.array(cell, np.float32))  # a null becomes NaN
        except (TypeError, ValueError):
            rows.append(np.empty(0))
        if rows[-1].size == 0 or rows[-1].ndim == 0:
            raise ValueError(f"{name} has no regular list of numbers in row {row}")
        if rows[-1].shape != rows[0].shape:
            raise ValueError(
                f"{name} has {columns.picture} of shape {rows[-1].shape} in row {row} "
                f"and {rows[0].shape} before: all must be alike"
            )
    values = np.stack(rows)
    if columns.numbers == "uint8" and np.isfinite(values).all():
        values = values.astype(np.uint8)
    return as_images(values, name)
