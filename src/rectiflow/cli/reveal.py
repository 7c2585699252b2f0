"""An animation of pictures that turn from one view into the next, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rectiflow.files import atomic_path

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from rectiflow.guidance.views import View

MOVES = 16
"""Pictures between two views."""
HELD, SHORT = 1200, 60
"""Milliseconds of a view, and of a picture between two."""


def write_reveal(
    shown: Sequence[Float[Tensor, "b c h w"]], views: Sequence[View], path: Path | str
) -> Path:
    """Write a GIF in which every pixel travels to its place in the next view, and round again.

    Args:
        shown: what every view shows of pictures in [-1, 1], which stand side by side.
        views: the views, which move pixels or change their signs.
        path: the file.
    """
    import torch
    from PIL import Image

    from rectiflow.training.figures import tile

    size = shown[0].shape[-2:]
    scale = max(1, round(64 / max(size)))
    ends = [_seen(images, view) for images, view in zip(shown, views)]
    sheets, times = [], []
    for (places, values), (after, next_values) in zip(ends, [*ends[1:], ends[0]]):
        for number in range(MOVES):
            share = number / MOVES
            # Slow at both ends.
            share = share * share * (3 - 2 * share)
            drawn = _draw(
                torch.lerp(places, after, share),
                torch.lerp(values, next_values, share),
                size,
                scale,
            )
            sheets.append(Image.fromarray(tile(drawn, columns=len(shown[0]), gap=scale).numpy()))
            times.append(HELD if number == 0 else SHORT)
    with atomic_path(path) as temporary:
        sheets[0].save(
            temporary,
            format="gif",
            save_all=True,
            append_images=sheets[1:],
            duration=times,
            loop=0,
        )
    return Path(path)


def _seen(images: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Where the pixels of pictures stand in a view of them, `(2, n)`, and their values there."""
    import torch

    height, width = images.shape[-2:]
    numbered = torch.arange(height * width, dtype=torch.float64).view(1, height, width)
    places = view.places.apply(numbered).flatten().argsort()
    values = images.flatten(-2)[..., places]
    return torch.stack([places // width, places % width]).float(), values


def _draw(places: Tensor, values: Tensor, size: Sequence[int], scale: int) -> Tensor:
    """Squares at places, on grey."""
    canvas = values.new_zeros(*values.shape[:2], size[0] * scale, size[1] * scale)
    top, left = (places * scale).round().long()
    for down in range(scale):
        for right in range(scale):
            canvas[:, :, top + down, left + right] = values
    return canvas
