"""Degradations from words, such as `box:4`, `blur:11:1.5` or `grey+downscale:2`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rectiflow.errors import unknown
from rectiflow.images.degradations.blurs import Blur, gaussian_kernel, motion_kernel
from rectiflow.images.degradations.compression import JPEG
from rectiflow.images.degradations.linear import Identity
from rectiflow.images.degradations.masks import Mask, box_mask, read_mask
from rectiflow.images.degradations.resampling import Downscale, Grey

if TYPE_CHECKING:
    from rectiflow.images.degradations.linear import Degradation

# word to: how it is written, and what makes it of the image's shape and the values given.
KINDS: dict[str, tuple[str, Callable[..., Degradation]]] = {
    "identity": ("identity", lambda image: Identity()),
    "mask": ("mask:FILE", lambda image, file: Mask(read_mask(file))),
    "box": ("box:SIDE", lambda image, side: Mask(box_mask(image, int(side)))),
    "downscale": ("downscale:FACTOR", lambda image, factor: Downscale(int(factor))),
    "blur": (
        "blur:SIZE:STD[:PADDING]",
        lambda image, size, std, padding="reflect": Blur(
            gaussian_kernel(int(size), float(std)), padding
        ),
    ),
    "motion": (
        "motion:LENGTH[:ANGLE[:PADDING]]",
        lambda image, length, angle="0", padding="reflect": Blur(
            motion_kernel(int(length), float(angle)), padding
        ),
    ),
    "grey": ("grey", lambda image: Grey()),
    "jpeg": ("jpeg[:QUALITY]", lambda image, quality="50": JPEG(int(quality))),
}


def build(spec: str, image: Sequence[int]) -> Degradation:
    """The degradation of a word, or of several joined by `+` and applied from left to right.

    Args:
        spec: `identity`, `mask:FILE`, `box:SIDE`, `downscale:FACTOR`, `blur:SIZE:STD[:PADDING]`,
            `motion:LENGTH[:ANGLE[:PADDING]]`, `grey`, `jpeg[:QUALITY]`.
        image: shape of the images, `(c, h, w)`, which is checked.

    Raises:
        ValueError: an unknown word, values that do not belong to it, or images it cannot take.

    Example:
        >>> build("grey+downscale:2", (3, 8, 8)).shape((3, 8, 8))
        (1, 4, 4)
    """
    found: Degradation | None = None
    shape = tuple(image)
    for part in spec.split("+"):
        one = _one(part, shape)
        shape = one.shape(shape)
        found = one if found is None else one @ found
    assert found is not None
    return found


def _one(text: str, image: tuple[int, ...]) -> Degradation:
    word, *values = text.split(":")
    if word not in KINDS:
        raise unknown("degradation", word, KINDS)
    written, make = KINDS[word]
    if word == "mask":
        # A file name may hold colons.
        values = [":".join(values)] if values else []
    required = written.partition("[")[0].count(":")
    if not required <= len(values) <= written.count(":"):
        raise ValueError(f"the degradation {text!r} is not understood: write {written}")
    try:
        return make(image, *values)
    except ValueError as error:
        if "convert" in str(error) or "invalid literal" in str(error):
            raise ValueError(
                f"the degradation {text!r} is not understood: write {written}"
            ) from None
        raise
