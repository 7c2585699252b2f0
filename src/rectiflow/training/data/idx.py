"""IDX files, the format of MNIST and its relatives, and Fashion-MNIST in it."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from rectiflow.training.data.image_data import ImageData

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where dataset-fashion-mnist puts its files
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLITS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


def load_fashion_mnist(folder: Path | None, *, split: str) -> ImageData:
    """Fashion-MNIST's own split: 60,000 grey 28x28 images for training, 10,000 for testing.

    Args:
        folder: where the four IDX files are, plain or `.gz`. None looks in `RECTIFLOW_DATA`, its
            sub-folder `fashion-mnist`, and the place of the Debian package.
        split: train, test or all (training images first).

    Raises:
        FileNotFoundError: if the files are not there.
        ValueError: if a file is damaged or does not belong to the others.

    Source: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747.
    """
    folder = folder or find_fashion_mnist()
    images, labels = [], []
    for part in SPLITS[split]:
        images.append(_checked(folder, part, "images-idx3-ubyte", 3))
        labels.append(_checked(folder, part, "labels-idx1-ubyte", 1))
        if len(images[-1]) != len(labels[-1]):
            raise ValueError(
                f"{folder} has {len(images[-1])} {part} images and {len(labels[-1])} labels: "
                "the files do not belong together"
            )
        if labels[-1].size and labels[-1].max() >= len(CLASSES):
            raise ValueError(f"{folder} has the {part} label {labels[-1].max()}: expected 0..9")
    return ImageData(
        "fashion-mnist",
        np.concatenate(images)[:, None],
        np.concatenate(labels).astype(np.int64),
        CLASSES,
        None,
    )


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, plain or `.gz`.

    The file starts with two zero bytes, the type (8 for unsigned bytes) and the number of
    dimensions; the dimensions follow as big-endian 32-bit integers, then the values.

    Args:
        path: the file.

    Raises:
        ValueError: if it starts otherwise, is shorter or longer than it says, or its gzip
            stream is damaged.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 8 or magic[3] == 0:
                raise ValueError(
                    f"{path} is not an IDX file of unsigned bytes: it starts with "
                    f"{magic.hex(' ') or 'nothing'}, expected 00 00 08 and a number of dimensions"
                )
            sizes = stream.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise ValueError(f"{path} is truncated in its header")
            shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
            values = _read_at_most(stream, math.prod(shape) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from None
    if len(values) != math.prod(shape):
        what = "truncated" if len(values) < math.prod(shape) else "longer than it says"
        held = f"{len(values):,}" if what == "truncated" else "more"
        raise ValueError(
            f"{path} is {what}: {math.prod(shape):,} bytes of values expected for shape {shape}, "
            f"found {held}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_at_most(stream: BufferedIOBase, count: int) -> bytes:
    """Up to `count` bytes, in pieces: a false header must not reserve memory."""
    pieces = []
    while count > 0 and (piece := stream.read(min(count, 1 << 20))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _checked(folder: Path, part: str, kind: str, dimensions: int) -> np.ndarray:
    """One of the four files, whose name may have a dot for its second hyphen."""
    names = [f"{part}-{kind}", f"{part}-{kind.replace('-idx', '.idx')}"]
    for name in (f"{name}{end}" for name in names for end in ("", ".gz")):
        if (folder / name).is_file():
            values = read_idx(folder / name)
            if values.ndim != dimensions:
                raise ValueError(
                    f"{folder / name} has {values.ndim} dimensions, expected {dimensions}"
                )
            return values
    raise FileNotFoundError(
        f"no {names[0]} or {names[0]}.gz in {folder}/: pass fashion-mnist:FOLDER with the four "
        "IDX files"
    )


def find_fashion_mnist() -> Path:
    """The folder of Fashion-MNIST's IDX files: under $RECTIFLOW_DATA, or Debian's package."""
    places = [DEBIAN]
    if given := os.environ.get("RECTIFLOW_DATA"):
        places = [Path(given), Path(given) / "fashion-mnist", DEBIAN]
    for place in places:
        if any(place.glob("t*-images?idx3-ubyte*")):
            return place
    raise FileNotFoundError(
        f"no Fashion-MNIST in {' or '.join(map(str, places))}: install the Debian package "
        "dataset-fashion-mnist, or pass fashion-mnist:FOLDER with the four IDX files"
    )
