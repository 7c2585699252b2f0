"""Images that come as arrays of numbers: checks, splits, and resizing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.splits import choose, held_out

CHUNK = 4096  # images looked at together, so that a memory map is never read in whole
SLACK = 1e-5  # float32 arithmetic may leave [-1, 1] by rounding
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow uses


def load_npy(path: Path, *, split: str) -> ImageData:
    """Images or vectors in one `.npy` file.

    Accepted are `uint8` in 0..255 and floats in [-1, 1], of shape (n, c, h, w), (n, h, w) for
    grey images, or (n, d) for vectors, which become images of d channels and one pixel. The
    whole of a `uint8` or `float32` file (split `all`) stays a memory map.

    Args:
        path: the file.
        split: train, test or all; a fixed fifth of the rows is for testing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no array of this kind, or has NaN, infinity or values out of range;
            the first bad row is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass npy:PATH with a .npy array")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy array of numbers ({error})") from None
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays: pass npy:PATH with one .npy array")
    images = as_images(values, path.name)
    data = ImageData(f"npy:{path.stem}", images, None, (), None)
    return data if split == "all" else data.subset(choose(held_out(len(data)), split))


def as_images(values: np.ndarray, name: str) -> np.ndarray:
    """Bring an array to (n, c, h, w), `uint8` or `float32`, after checking every value."""
    if values.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name} has shape {values.shape}: expected (n, c, h, w), (n, h, w) or (n, d)"
        )
    if values.dtype != np.uint8 and not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name} holds {values.dtype}: expected uint8 or floats in [-1, 1]")
    if values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}: there are no values in it")
    if values.dtype != np.uint8:
        _check_floats(values, name)
        values = values.astype(np.float32, copy=False)
        if not values.dtype.isnative:
            values = values.astype(np.float32)
    if values.ndim == 3:
        return values[:, None]
    return values.reshape(len(values), -1, 1, 1) if values.ndim == 2 else values


def _check_floats(values: np.ndarray, name: str) -> None:
    for start in range(0, len(values), CHUNK):
        rows = np.asarray(values[start : start + CHUNK], np.float64)
        rows = rows.reshape(len(rows), -1)
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise ValueError(f"{name} has NaN or infinity in row {row}: remove or repair it")
        inside = (np.abs(rows) <= 1 + SLACK).all(1)
        if not inside.all():
            bad = int(np.argmin(inside))
            raise ValueError(
                f"{name} has values from {rows[bad].min():.4g} to {rows[bad].max():.4g} in row "
                f"{start + bad}: floats must be in [-1, 1], so rescale them or pass uint8"
            )


def reshape(
    images: np.ndarray, *, size: int | None, channels: int | None, pad: bool = False
) -> np.ndarray:
    """Bring arrays of images to another size and number of channels.

    The centred square is resized by bicubic interpolation, smoothed before reducing; grey is
    repeated for three channels, and colour becomes its ITU-R 601 luma for one.

    Args:
        images: array (n, c, h, w), `uint8` or `float32`.
        size: side of the result; None keeps the size.
        channels: 1 or 3; None keeps the channels.
        pad: reach a greater size by a black border in place of interpolation, up to a quarter
            more than the images' own.

    Raises:
        ValueError: if the images have neither 1 nor 3 channels and others are asked for.
    """
    _, have, height, width = images.shape
    if channels not in (None, have) and have not in (1, 3):
        raise ValueError(f"cannot turn {have} channels into {channels}")
    if channels in (None, have) and size in (None, height) and (size is None or height == width):
        return images
    return np.concatenate([
        _reshape_some(images[start : start + CHUNK], size, channels or have, pad)
        for start in range(0, len(images), CHUNK)
    ]) if len(images) else _reshape_some(images, size, channels or have, pad)  # fmt: skip


def _reshape_some(images: np.ndarray, size: int | None, channels: int, pad: bool) -> np.ndarray:
    x = torch.from_numpy(np.array(images, np.float32))
    low, high = (0.0, 255.0) if images.dtype == np.uint8 else (-1.0, 1.0)
    if size is not None:
        side = min(x.shape[2:])
        top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
        x = x[:, :, top : top + side, left : left + side]
        if pad and side < size <= side * 5 // 4:
            before = (size - side) // 2
            after = size - side - before
            x = torch.nn.functional.pad(x, (before, after, before, after), value=low)
        elif side != size and len(x):
            x = torch.nn.functional.interpolate(
                x, (size, size), mode="bicubic", antialias=True, align_corners=False
            )
    if channels == 3 and x.shape[1] == 1:
        x = x.repeat(1, 3, 1, 1)
    elif channels == 1 and x.shape[1] == 3:
        x = (x * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    x = x.clamp(low, high)  # bicubic overshoots at edges
    return (x.round() if images.dtype == np.uint8 else x).numpy().astype(images.dtype)
