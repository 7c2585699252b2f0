"""A folder of pictures, with class sub-folders as labels and `metadata.csv` as captions."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from rectiflow.errors import require
from rectiflow.training.data.decoding import Settings, decode_split
from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.pictures import EXTENSIONS
from rectiflow.training.data.splits import held_out

CAPTIONS = "metadata.csv"


@dataclass
class Listing:
    """The picture files below a root, relative to it and sorted, and the caption tables."""

    root: Path
    files: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    folders: int = 0


def load_folder(path: Path, *, split: str, settings: Settings) -> ImageData:
    """Every picture below a folder.

    Labels: with two or more first-level sub-folders and no picture outside of them, each
    sub-folder is a class. Captions: a `metadata.csv` with columns `file_name` (relative to
    the table's folder) and `text`; pictures without a text are passed over, as are rows of
    unknown files and repeated rows. Splits: folders `train` and `test` at the first level are
    taken as they are (their sub-folders are the classes); otherwise a fixed fifth of the files
    is for testing. Hidden files and folders are ignored.

    Args:
        path: the folder.
        split: train, test or all.
        settings: size, channels, cache and progress.

    Raises:
        FileNotFoundError: if the folder is missing or holds no picture.
        ValueError: if all pictures are bad, sizes are mixed without a size, or no caption
            belongs to a picture.
    """
    require("app", "PIL")
    listing = _list(path)
    if not listing.files:
        folders = f"{listing.folders} folder{'s' if listing.folders != 1 else ''}"
        raise FileNotFoundError(
            f"no images in {path}/ (looked for {', '.join(EXTENSIONS)} in {folders})"
        )
    files, captions = listing.files, None
    skipped: list[tuple[str, str]] = []
    if listing.tables:
        texts, skipped = _read_captions(listing)
        skipped += [(file, f"no text in {CAPTIONS}") for file in files if file not in texts]
        files = [file for file in files if file in texts]
        captions = [texts[file] for file in files]
    test, inner = _own_split(files)
    labels, classes = _labels(inner)
    return decode_split(
        f"folder:{path.resolve().name}",
        [(file, path / file) for file in files],
        [_stamp(path, file) for file in files],
        split=split,
        test=test,
        settings=settings,
        labels=labels,
        classes=classes,
        captions=captions,
        skipped=tuple(sorted(skipped)),
    )


def _list(root: Path) -> Listing:
    if not root.exists():
        raise FileNotFoundError(f"no folder {root}/: pass folder:PATH with a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: pass folder:PATH with a folder of images")
    listing = Listing(root)
    for folder, names in _walk(root):
        listing.folders += 1
        for name in names:
            relative = PurePosixPath(folder.relative_to(root).as_posix(), name).as_posix()
            if name == CAPTIONS:
                listing.tables.append(relative)
            elif name.lower().endswith(EXTENSIONS):
                listing.files.append(relative)
    listing.files.sort()
    listing.tables.sort()
    return listing


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and their file names, through links too, each folder once."""
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(folder), [name for name in names if not name.startswith(".")]


def _stamp(root: Path, file: str) -> tuple[str, int, int]:
    """Name, length and time of change (of a broken link: that it is one)."""
    try:
        status = (root / file).stat()
    except OSError:
        return file, -1, -1
    return file, status.st_size, status.st_mtime_ns


def _own_split(files: list[str]) -> tuple[np.ndarray, list[str]]:
    """Mask of the test files, and the names below the folders of the splits, if there are any."""
    tops = [PurePosixPath(file).parts[0] for file in files]
    if {"train", "test"} == {*tops}:
        return np.array([top == "test" for top in tops]), [file.split("/", 1)[1] for file in files]
    return held_out(len(files)), files


def _labels(files: list[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Class indices by first-level folder."""
    tops = [file.split("/", 1)[0] if "/" in file else "" for file in files]
    classes = tuple(sorted(set(tops)))
    if "" in classes or len(classes) < 2:
        return None, ()
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[top] for top in tops], np.int64), classes


def _read_captions(listing: Listing) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Text by file, and the rows that could not be used."""
    known = set(listing.files)
    texts: dict[str, str] = {}
    odd: list[tuple[str, str]] = []
    for table in listing.tables:
        place = PurePosixPath(table).parent
        for name, text in _rows(listing.root / table):
            file = os.path.normpath((place / name.replace("\\", "/")).as_posix())
            if file not in known:
                odd.append((name, f"in {table}, but there is no such image"))
            elif file in texts:
                odd.append((name, f"repeated in {table}; the first row is used"))
            elif text:
                texts[file] = text
    if not texts:
        raise ValueError(
            f"no row of {listing.root / listing.tables[0]} gives a text to any of the "
            f"{len(known)} images: file_name must be relative to the table's folder"
        )
    return texts, odd


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """File name and text of each row."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or ()
            if not {"file_name", "text"} <= {*columns}:
                found = ", ".join(columns) or "none"
                raise ValueError(f"{table} needs the columns file_name and text, found: {found}")
            for row in reader:
                yield (row["file_name"] or "").strip(), (row["text"] or "").strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a UTF-8 comma-separated table ({error})") from None
