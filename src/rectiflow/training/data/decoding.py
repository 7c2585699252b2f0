"""Decode many pictures once, into memory or a memory-mapped cache, passing over the bad ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rectiflow.files import atomic_folder, cache_folder, read_json, write_json
from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.pictures import (
    BadPictureError,
    Header,
    Source,
    read_header,
    read_picture,
)

Progress = Callable[[int, int], None]
FORMAT = 1  # raise when the same files would decode to other pixels
IN_MEMORY = 256 * 2**20  # bytes; more than this goes to a cache even if none was asked for


class Items(Protocol):
    """(name, file or bytes) of pictures, to be gone through more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[str, Source]]: ...


@dataclass(frozen=True)
class Settings:
    """How pictures are decoded and where the result is kept."""

    size: int | None = None
    channels: int | None = None
    cache: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Decoded:
    """Pixels of the good items: `kept[i]` is the item that `images[i]` came from."""

    images: np.ndarray
    kept: np.ndarray
    skipped: tuple[tuple[str, str], ...]


def decode_split(
    name: str,
    items: Items,
    stamp: Any,
    *,
    split: str,
    test: np.ndarray,
    settings: Settings,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = (),
    captions: list[str] | None = None,
    skipped: tuple[tuple[str, str], ...] = (),
) -> ImageData:
    """Decode all items and return one split of them, as a view without a copy.

    The training images come first in the decoded array and the test images last, so that both
    are contiguous parts of one memory map.

    Args:
        name: name of the data.
        items: the pictures.
        stamp: JSON value that changes whenever any item does.
        split: train, test or all.
        test: mask of the test items.
        settings: size, channels, cache and progress.
        labels: a class index per item.
        classes: names of the classes.
        captions: a text per item.
        skipped: what was passed over already.

    Raises:
        ValueError: if every item is bad, or sizes are mixed and no size was given.
    """
    order = np.concatenate([np.flatnonzero(~test), np.flatnonzero(test)])
    decoded = _decode(name, items, stamp, order, settings)
    border = int((~test[decoded.kept]).sum())
    part = {"train": slice(0, border), "test": slice(border, None), "all": slice(None)}[split]
    kept = decoded.kept[part]
    return ImageData(
        name,
        decoded.images[part],
        None if labels is None else labels[kept],
        classes,
        None if captions is None else tuple(captions[i] for i in kept),
        skipped + decoded.skipped,
    )


def _decode(name: str, items: Items, stamp: Any, order: np.ndarray, settings: Settings) -> Decoded:
    key = json.dumps([FORMAT, stamp, settings.size, settings.channels])
    slug = ImageData(name, np.zeros((0, 1, 1, 1), np.uint8), None, (), None).slug
    folder = f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    for root in (settings.cache, cache_folder()):
        if root is not None and (found := _open_cache(root / folder)) is not None:
            return found
    channels, height, width, bad = _plan(name, items, settings)
    shape = (len(items), channels, height, width)
    cache = settings.cache
    if cache is None and np.prod(shape, dtype=np.int64) > IN_MEMORY:
        cache = cache_folder()
    if cache is None:
        images = np.empty(shape, np.uint8)
        kept, skipped = _fill(images, name, items, order, bad, settings)
        return Decoded(images[: len(kept)], kept, skipped)
    trouble: OSError | None = None
    try:
        with atomic_folder(cache / folder) as temporary:
            images = _new_map(temporary / "images.npy", shape)
            kept, skipped = _fill(images, name, items, order, bad, settings)
            images.flush()
            write_json(temporary / "index.json", {"kept": kept.tolist(), "skipped": skipped})
    except OSError as error:
        # Another process may have put the same cache there in the meantime.
        trouble = error
    found = _open_cache(cache / folder)
    if found is None:
        raise trouble or OSError(f"the cache {cache / folder} cannot be read back")
    return found


def _plan(
    name: str, items: Items, settings: Settings
) -> tuple[int, int, int, dict[int, BadPictureError]]:
    """Channels, height and width of the result from the headers, and the items without one."""
    headers: dict[int, Header] = {}
    bad: dict[int, BadPictureError] = {}
    for position, (_, source) in enumerate(items):
        try:
            headers[position] = read_header(source)
        except BadPictureError as error:
            bad[position] = error
    colours = {i for i, header in headers.items() if not header.grey}
    channels = settings.channels
    if channels is None:
        # a damaged picture has no say in what the good ones are
        channels = 3 if _first_good(items, colours) is not None else 1
    if settings.size is not None:
        return channels, settings.size, settings.size, bad
    sizes = Counter((header.width, header.height) for header in headers.values())
    good = []
    for one in sizes if len(sizes) > 1 else ():
        members = {i for i, header in headers.items() if (header.width, header.height) == one}
        if _first_good(items, members) is not None:
            good.append(one)
        if len(good) > 1:
            raise ValueError(_mixed_sizes(name, sizes))
    width, height = good[0] if good else next(iter(sizes), (1, 1))
    return channels, height, width, bad


def _first_good(items: Items, members: set[int]) -> int | None:
    """The first of some items that decodes."""
    for position, (_, source) in enumerate(items if members else ()):
        if position in members:
            with contextlib.suppress(BadPictureError):
                read_picture(source)
                return position
    return None


def _mixed_sizes(name: str, sizes: Counter[tuple[int, int]]) -> str:
    common = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(4))
    more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
    return f"images of {name} have mixed sizes: {common}{more}; pass --size to crop and resize them"


def _fill(
    images: np.ndarray,
    name: str,
    items: Items,
    order: np.ndarray,
    bad: dict[int, BadPictureError],
    settings: Settings,
) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
    """Decode every item into its row, then close the gaps that bad ones left."""
    total, channels, height, width = images.shape
    row_of = np.empty(total, np.int64)
    row_of[order] = np.arange(total)
    skipped = []
    is_good = np.zeros(total, bool)
    for position, (item, source) in enumerate(items):
        try:
            if position in bad:
                raise bad[position]
            pixels = read_picture(source, size=settings.size, channels=channels)
            if pixels.shape[1:] != (height, width):
                found = f"{pixels.shape[2]}x{pixels.shape[1]}"
                raise BadPictureError(f"{found} pixels where the others have {width}x{height}")
            images[row_of[position]] = pixels
            is_good[position] = True
        except BadPictureError as error:
            skipped.append((item, str(error)))
        if settings.progress is not None:
            settings.progress(position + 1, total)
    if not is_good.any():
        first, reason = skipped[0]
        raise ValueError(
            f"no readable image in {name}: all {total} files are bad (the first: {first}, {reason})"
        )
    kept = order[is_good[order]]
    for new, position in enumerate(kept):
        if new != row_of[position]:
            images[new] = images[row_of[position]]
    return kept, tuple(skipped)


def _new_map(path: Path, shape: tuple[int, ...]) -> np.memmap:
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # a full disk is an OSError here, and a bus error when first met inside the map
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return images


def _open_cache(folder: Path) -> Decoded | None:
    """A cache's contents as a read-only map, or None where it is absent or damaged."""
    try:
        index = read_json(folder / "index.json")
        kept = np.asarray(index["kept"], np.int64)
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        skipped = tuple((str(item), str(reason)) for item, reason in index["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Decoded(images[: len(kept)], kept, skipped) if len(images) >= len(kept) else None
