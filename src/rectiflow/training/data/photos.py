"""Crops of the colour photographs that scikit-image and scikit-learn carry in their wheels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rectiflow.errors import positive, require
from rectiflow.training.data.image_data import ImageData

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# The right half of the stereo pair is left out: its training crops would show the left's test parts
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
TRAIN, TEST = 4000, 1000  # crops of all photographs together
GRID = 5  # tiles along each side, at most; one tile of each row is for testing


@dataclass(frozen=True)
class Tiles:
    """A photograph cut into rows and columns, with one test tile in each row and column."""

    edges_x: np.ndarray
    edges_y: np.ndarray
    test: np.ndarray  # test[row] is the column of the row's test tile

    @property
    def side(self) -> int:
        """The shorter side of the smallest tile."""
        return int(min(np.diff(self.edges_x).min(), np.diff(self.edges_y).min()))

    def test_boxes(self) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of the test tiles."""
        x, y = self.edges_x.tolist(), self.edges_y.tolist()
        return [(x[c], y[r], x[c + 1], y[r + 1]) for r, c in enumerate(self.test.tolist())]


def load_photos(*, split: str, size: int | None = None, channels: int | None = None) -> ImageData:
    """Square crops of ten photographs, each photograph a class: 4,000 for training, 1,000 for test.

    A crop is from `size` pixels wide to as wide as a tile (four times `size` at most), evenly in
    the logarithm, and is resized by Lanczos. Each photograph is cut into 5x5 tiles (fewer where
    they would be smaller than `size`), one in each row and column for testing; test crops lie
    within such a tile and training crops outside of all of them, so the two never share a pixel.

    Args:
        split: train, test or all (training crops first).
        size: side of the result in pixels, 32 if None.
        channels: 1 or 3 (3 if None).

    Raises:
        MissingExtraError: if neither library's photographs are installed.
        ValueError: if `size` is more than half of every photograph.
    """
    require("app", "PIL", "sklearn")
    require("data", "skimage")
    size = 32 if size is None else size
    positive("size", size)
    mode = "L" if channels == 1 else "RGB"
    photos = {name: photo for name in PHOTOS if (photo := _open(name, mode)) is not None}
    photos = {name: photo for name, photo in photos.items() if min(photo.size) >= 2 * size}
    if not photos:
        raise ValueError(f"size must be at most half of a photograph's side, got {size}")
    images, labels = [], []
    for part in ("train", "test") if split == "all" else (split,):
        total = TEST if part == "test" else TRAIN
        for label, (name, photo) in enumerate(photos.items()):
            count = total // len(photos) + (label < total % len(photos))
            boxes = crop_boxes(photo.size, size, count, part, seed=list(PHOTOS).index(name))
            images.append(_crop(photo, boxes, size))
            labels.append(np.full(count, label, np.int64))
    return ImageData("photos", np.concatenate(images), np.concatenate(labels), (*photos,), None)


def crop_boxes(
    shape: tuple[int, int], size: int, count: int, part: str, *, seed: int
) -> list[tuple[int, int, int, int]]:
    """Where the crops of one photograph lie: left, top, right and bottom of each."""
    tiles = _tiles(shape, size, seed)
    tests = tiles.test_boxes()
    random = np.random.Generator(np.random.PCG64([seed, size, part == "test"]))
    boxes: list[tuple[int, int, int, int]] = []
    widest = min(tiles.side / size, 4.0)
    while len(boxes) < count:
        side = int(size * widest ** random.random() + 1e-9)
        outer = tests[random.integers(len(tests))] if part == "test" else (0, 0, *shape)
        # the side is kept while a place for it is sought, or training crops would be the smaller
        while True:
            left = int(random.integers(outer[0], outer[2] - side + 1))
            top = int(random.integers(outer[1], outer[3] - side + 1))
            box = (left, top, left + side, top + side)
            if part == "test" or not any(_overlap(box, other) for other in tests):
                break
        boxes.append(box)
    return boxes


def _tiles(shape: tuple[int, int], size: int, seed: int) -> Tiles:
    grid = min(GRID, *(side // size for side in shape))
    order = np.argsort(np.random.PCG64(seed).random_raw(grid), kind="stable")
    width, height = shape
    steps = np.arange(grid + 1)
    return Tiles(width * steps // grid, height * steps // grid, order)


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return (
        one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
    )  # fmt: skip


def _crop(photo: Picture, boxes: list[tuple[int, int, int, int]], size: int) -> np.ndarray:
    from PIL import Image

    # cropped before resizing: resizing a box of the photograph would look beyond its edges
    crops = [photo.crop(box).resize((size, size), Image.Resampling.LANCZOS) for box in boxes]
    pixels = np.stack([np.asarray(crop) for crop in crops])
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def _open(name: str, mode: str) -> Picture | None:
    """A photograph, or None where this version of its library does not carry it."""
    from PIL import Image

    package, inside = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / inside if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    with Image.open(path) as photo:
        return photo.convert(mode)
