"""Pictures that a command is given: read, checked against the model, never changed silently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.cli.models import Opened


def picture_shape(opened: Opened) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model works on."""
    shape = opened.model.shape
    if shape is None or len(shape) != 3:
        raise ValueError(f"the model's samples have shape {shape}: a model of images is needed")
    if opened.pipe is None:
        return shape[0], shape[1], shape[2]
    scale = opened.pipe.vae_scale_factor
    return int(opened.pipe.vae.config.in_channels), shape[1] * scale, shape[2] * scale


def read_images(
    paths: Sequence[Path], shape: tuple[int, int, int], *, fit: bool = False
) -> Float[Tensor, "b c h w"]:
    """Pictures, or arrays of pictures in `.npy` files, as floats in [-1, 1].

    Args:
        paths: the files; arrays are uint8, or floats in [-1, 1], of shape (n, c, h, w).
        shape: channels, height and width that are wanted.
        fit: crop, scale and turn grey or coloured what is of another kind.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no files, or one that is damaged or of another size, mode or range.
    """
    import torch

    if not paths:
        raise ValueError("no images were given: name one or more files")
    found = []
    for path in paths:
        if not path.is_file():
            what = "is a folder: name the images in it" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"the image {path} {what}")
        values: Any = _array(path) if path.suffix == ".npy" else _picture(path, shape, fit)
        if values.shape[1:] != shape:
            raise ValueError(
                f"{path} holds images of shape {tuple(values.shape[1:])} (channels, height, "
                f"width) but the model takes {shape}"
            )
        found.append(torch.from_numpy(values))
    return torch.cat(found)


def _array(path: Path) -> Any:
    import numpy as np

    from rectiflow.training.data.arrays import as_images

    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy array of numbers ({error})") from None
    return _scaled(as_images(values, str(path)))


def _picture(path: Path, shape: tuple[int, int, int], fit: bool) -> Any:
    from rectiflow.training.data.pictures import BadPictureError, read_header, read_picture

    channels, height, width = shape
    if fit and height != width:
        raise ValueError(f"--fit makes square images, and the model takes {width}x{height}")
    try:
        header = read_header(path)
        if not fit and (header.width, header.height) != (width, height):
            raise BadPictureError(
                f"it has {header.width}x{header.height} pixels but the model takes "
                f"{width}x{height}: pass --fit to crop and scale it"
            )
        if not fit and header.grey != (channels == 1):
            kinds = ("grey", "coloured") if header.grey else ("coloured", "grey")
            raise BadPictureError(
                f"it is {kinds[0]} but the model takes {kinds[1]} images: pass --fit to convert it"
            )
        pixels = read_picture(path, size=height if fit else None, channels=channels)
    except BadPictureError as error:
        raise ValueError(f"the image {path} cannot be used: {error}") from None
    return _scaled(pixels[None])


def _scaled(values: Any) -> Any:
    """Bytes as floats in [-1, 1]; floats as they are."""
    import numpy as np

    if values.dtype != np.uint8:
        return values
    return values.astype(np.float32) / np.float32(127.5) - np.float32(1)
