"""Decode one picture file, whatever its mode, into plain 8-bit pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 exchange width and height

Source = Path | bytes | None


class BadPictureError(ValueError):
    """A file that does not hold a usable picture; the message is the reason."""


@dataclass(frozen=True)
class Header:
    """What a picture says of itself before its pixels are read."""

    width: int
    height: int
    grey: bool


def read_header(source: Source) -> Header:
    """Size (as shown, after EXIF orientation) and kind, without decoding the pixels.

    Raises:
        BadPictureError: if this is no picture.
    """
    with _opened(source) as picture:
        width, height = picture.size
        # Only here: asking a PNG without this entry would decode it; TIFF sizes are turned already
        if "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        return Header(width, height, picture.mode in GREY_MODES)


def read_picture(source: Source, *, size: int | None = None, channels: int = 3) -> np.ndarray:
    """Decode a picture to `uint8` pixels of shape (channels, height, width).

    EXIF orientation is applied; transparency is laid over white; CMYK and palettes become RGB;
    16-bit grey is scaled to 8 bits (v / 257, rounded), not cut; of an animation the first frame
    is taken. Grey from colour is the ITU-R 601 luma. With `size` the largest centred square is
    resized by Lanczos, which also smooths before reducing (no aliasing).

    Args:
        source: a file or its bytes.
        size: side of the result in pixels; None keeps the picture's own size.
        channels: 1 or 3.

    Raises:
        BadPictureError: if the picture is truncated, empty, of another kind, of more pixels
            than Pillow's `MAX_IMAGE_PIXELS`, or has floating-point pixels (of unknown range).
    """
    from PIL import Image, ImageOps

    with _opened(source) as opened:
        picture = _eight_bit(ImageOps.exif_transpose(opened), "L" if channels == 1 else "RGB")
        if size is not None:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
            if side != size:
                picture = picture.resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bit(picture: Picture, mode: str) -> Picture:
    """The picture in mode L or RGB."""
    from PIL import Image

    if picture.mode == "F":
        raise BadPictureError("floating-point pixels of unknown range: save as 8 or 16 bits")
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadPictureError("integer pixels outside 0..65535: save as 8 or 16 bits")
        picture = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        under = Image.new("RGBA", picture.size, "white")
        under.alpha_composite(picture.convert("RGBA"))
        picture = under.convert("RGB")
    return picture if picture.mode == mode else picture.convert(mode)


@contextmanager
def _opened(source: Source) -> Iterator[Picture]:
    """Open a picture; everything that goes wrong inside becomes a `BadPictureError`."""
    from PIL import Image, UnidentifiedImageError

    if source is None:
        raise BadPictureError("no picture")
    try:
        if (source.stat().st_size if isinstance(source, Path) else len(source)) == 0:
            raise BadPictureError("empty file")
        stream: Any = source if isinstance(source, Path) else io.BytesIO(source)
        with warnings.catch_warnings():
            # Pillow complains in passing of odd metadata, and only warns of a small bomb
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream) as picture:
                yield picture
    except BadPictureError:
        raise
    except UnidentifiedImageError:
        raise BadPictureError("not an image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise BadPictureError(f"more than {limit} pixels (a decompression bomb?)") from None
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadPictureError(reason) from None
