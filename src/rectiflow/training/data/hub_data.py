"""Hugging Face data sets, from the hub or from disk, and parquet files of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rectiflow.errors import require
from rectiflow.training.data.arrow_data import Part, load_table
from rectiflow.training.data.decoding import Settings
from rectiflow.training.data.image_data import ImageData

ROWS = 64  # rows read together: what is held in memory of encoded pictures
TESTS = ("test", "validation", "valid", "val")


def load_hub(name: str, *, split: str, settings: Settings) -> ImageData:
    """A data set by its name on the hub, or a folder that `save_to_disk` wrote.

    Its own split is used where there are `train` and `test` (or `validation`); otherwise a fixed
    fifth of the rows is for testing. Images are in the first `Image` column, labels in a
    `ClassLabel` column or one called `label`, captions in `text` or `caption`.

    Args:
        name: `owner/name`, `owner/name@configuration`, or a folder.
        split: train, test or all.
        settings: size, channels, cache and progress.

    Raises:
        FileNotFoundError: if it cannot be found or reached.
        ValueError: if it has no image column, or its images are unusable.
    """
    require("data", "datasets", "pyarrow")
    require("app", "PIL")
    import datasets

    bare, _, configuration = name.partition("@")
    try:
        if any((Path(name) / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(bare, configuration or None)
    except ValueError as error:  # several configurations, or files of no known kind
        raise ValueError(f"cannot load hub:{name}: {_first_line(error)}") from None
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"cannot load hub:{name} ({_first_line(error)}): check the name and the network, or "
            "pass a folder written by save_to_disk"
        ) from None
    sets = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    test = next((one for one in TESTS if one in sets), None)
    train = next((one for one in ("train", *sets) if one in sets and one != test), None)
    chosen = [one for one in (train, test) if one is not None]
    return load_table(
        f"hub:{Path(name).name if Path(name).is_dir() else name}",
        sets[chosen[0]].features.arrow_schema,
        [_hub_part(sets[one], is_test=one == test) for one in chosen],
        [[one, sets[one]._fingerprint] for one in chosen],
        split=split,
        settings=settings,
        root=Path(name) if Path(name).is_dir() else Path(),
    )


def load_parquet(path: Path, *, split: str, settings: Settings) -> ImageData:
    """A parquet file, or all those below a folder, with a column of encoded images.

    Files whose name, or folder, begins with `test` are for testing; without such files a fixed
    fifth of the rows is. Columns are found as in `load_hub`; class names come from the features
    that Hugging Face's writer leaves in the file.

    Args:
        path: file or folder.
        split: train, test or all.
        settings: size, channels, cache and progress.

    Raises:
        FileNotFoundError: if there is no such file, or no `.parquet` in the folder.
        ValueError: if a file is damaged, their columns differ, or there are no images.
    """
    require("data", "pyarrow")
    require("app", "PIL")
    import pyarrow as pa

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        what = f"no .parquet file in {path}/" if path.is_dir() else f"no file {path}"
        raise FileNotFoundError(
            f"{what}: pass parquet:PATH with a parquet file or a folder of them"
        )
    parts, schema = [], None
    for file in files:
        try:
            part, own = _parquet_part(file, path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is no readable parquet file ({_first_line(error)})") from None
        if schema is not None and not own.equals(schema):
            raise ValueError(f"{file} has other columns than {files[0]}")
        schema = own
        parts.append(part)
    return load_table(
        f"parquet:{path.resolve().stem}",
        schema,
        parts,
        [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        split=split,
        settings=settings,
        root=path if path.is_dir() else path.parent,
    )


def _hub_part(dataset: Any, *, is_test: bool) -> Part:
    def read(columns: list[str]) -> Iterator[Any]:
        yield from dataset.select_columns(columns).with_format("arrow").iter(ROWS)

    return Part(len(dataset), read, is_test)


def _parquet_part(file: Path, root: Path) -> tuple[Part, Any]:
    """One file's rows, and its columns."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        rows, schema = opened.metadata.num_rows, opened.schema_arrow

    def read(columns: list[str]) -> Iterator[Any]:
        with parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(ROWS, columns=columns)

    inside = file.relative_to(root).parts if root != file else (file.name,)
    return Part(rows, read, any(one.lower().startswith("test") for one in inside)), schema


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
