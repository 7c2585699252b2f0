"""Data by one spec string: `digits`, `folder:cats`, `hub:owner/name` and the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rectiflow.errors import positive, unknown
from rectiflow.training.data.arrays import load_npy, reshape
from rectiflow.training.data.decoding import Settings
from rectiflow.training.data.digits import load_digits
from rectiflow.training.data.hub_data import load_hub, load_parquet
from rectiflow.training.data.idx import load_fashion_mnist
from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.image_folder import load_folder
from rectiflow.training.data.photos import load_photos
from rectiflow.training.data.splits import SPLITS

__all__ = ["SOURCES", "ImageData", "Source", "load", "parse"]

NAMED = 5  # skipped files named in the warning


@dataclass(frozen=True)
class Source:
    """One kind of data: what follows the colon (None, `[PATH]` if optional), and what it is."""

    argument: str | None
    summary: str


SOURCES = {
    "digits": Source(None, "1,797 handwritten digits, 8x8, ten classes (scikit-learn)"),
    "fashion-mnist": Source("[PATH]", "70,000 grey garments, 28x28, ten classes (IDX files)"),
    "photos": Source(None, "crops of ten bundled photographs (scikit-image, scikit-learn)"),
    "folder": Source("PATH", "a folder of images, with class sub-folders or metadata.csv"),
    "hub": Source("NAME", "a Hugging Face data set, or a folder written by save_to_disk"),
    "parquet": Source("PATH", "parquet files with a column of images"),
    "npy": Source("PATH", "one array of images or vectors, uint8 or floats in [-1, 1]"),
}


def load(
    spec: str,
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    folder: Path | str | None = None,
    cache: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load images from wherever a spec string points.

    Pictures in folders and tables are decoded once; with `cache`, or when they take more than
    256 MiB, into a memory-mapped file that the next call reuses until a file, the size or the
    channels change. Fashion-MNIST and sets with files of their own for testing keep their
    split; of all others a fixed fifth, the same on every machine, is for testing. Bad files
    are passed over, with one warning that names them.

    Args:
        spec: one of `SOURCES`, with its argument after a colon.
        split: `train`, `test` or `all`.
        size: side of square images in pixels. Pictures are cropped and resized (Lanczos);
            arrays are resized (antialiased bicubic), Fashion-MNIST padded with black up to 35.
            None keeps the size, which must then be the same for all (`photos`: 32).
        channels: 1 or 3; None takes 3 if any picture has colour.
        folder: where Fashion-MNIST's IDX files are, in place of a path in the spec.
        cache: folder to keep decoded pictures in.
        progress: called with (pictures done, pictures in all) while decoding.

    Returns:
        the split as `ImageData`.

    Raises:
        FileNotFoundError: if the data are not there.
        ValueError: for an unknown spec or split, an unusable size or channels, mixed sizes
            without `size`, or data in which nothing is usable.
        MissingExtraError: if the package that a source needs is not installed.

    Example:
        >>> data = load("digits", split="test")
        >>> len(data), data.shape, data.classes[:3]
        (359, (1, 8, 8), ('0', '1', '2'))
        >>> data.batch([0, 1]).shape, data.condition([0, 1])["label"].dtype
        (torch.Size([2, 1, 8, 8]), torch.int64)
    """
    kind, argument = parse(spec)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if size is not None:
        positive("size", size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if folder is not None and kind != "fashion-mnist":
        raise ValueError(f"folder= is for fashion-mnist; pass the path of {kind} in its spec")
    path = Path(argument).expanduser()
    settings = Settings(size, channels, None if cache is None else Path(cache), progress)
    fashion = path if argument else None if folder is None else Path(folder)
    loaders: dict[str, Callable[[], ImageData]] = {
        "digits": partial(load_digits, split=split),
        "fashion-mnist": partial(load_fashion_mnist, fashion, split=split),
        "photos": partial(load_photos, split=split, size=size, channels=channels),
        "folder": partial(load_folder, path, split=split, settings=settings),
        "hub": partial(load_hub, argument, split=split, settings=settings),
        "parquet": partial(load_parquet, path, split=split, settings=settings),
        "npy": partial(load_npy, path, split=split),
    }
    data = loaders[kind]()
    if kind in ("digits", "fashion-mnist", "npy"):
        data = _reshaped(data, size, channels, pad=kind == "fashion-mnist")
    if data.skipped:
        named = ", ".join(f"{file} ({reason})" for file, reason in data.skipped[:NAMED])
        more = len(data.skipped) - NAMED
        tail = f" and {more} more" if more > 0 else ""
        warnings.warn(f"skipped {len(data.skipped)} in {data.name}: {named}{tail}", stacklevel=2)
    if not len(data):
        raise ValueError(f"the {split} split of {data.name} is empty: add images or use split all")
    return data


def parse(spec: str) -> tuple[str, str]:
    """Split a spec into its kind and the text after the colon.

    Raises:
        ValueError: for an unknown kind, a missing argument, or one that is not taken.

    Example:
        >>> parse("folder:photos/cats")
        ('folder', 'photos/cats')
    """
    kind, colon, argument = spec.partition(":")
    if kind not in SOURCES:
        if Path(spec).expanduser().is_dir():
            raise ValueError(f"unknown data {spec!r}: did you mean 'folder:{spec}'?")
        raise unknown("data", kind, SOURCES)
    takes = SOURCES[kind].argument
    if takes is None and colon:
        raise ValueError(f"{kind} takes nothing after a colon, got {spec!r}")
    if takes in ("PATH", "NAME") and not argument:
        raise ValueError(f"{kind} needs a {takes.lower()}, as in {kind}:{takes}, got {spec!r}")
    return kind, argument


def _reshaped(data: ImageData, size: int | None, channels: int | None, *, pad: bool) -> ImageData:
    images = reshape(data.images, size=size, channels=channels, pad=pad)
    return ImageData(data.name, images, data.labels, data.classes, data.captions, data.skipped)
