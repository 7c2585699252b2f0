"""Folders of little image files."""

from __future__ import annotations

import io

from PIL import Image


def solid(colour, mode="RGB", size=(6, 4)):
    return Image.new(mode, size, colour)


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def coloured(count, size=(6, 4)):
    """Image files whose red value is their number."""
    return {f"{i:02}.png": encoded(solid((i, 0, 0), size=size)) for i in range(count)}


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
