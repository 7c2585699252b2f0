"""Scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from rectiflow.errors import require
from rectiflow.training.data.image_data import ImageData
from rectiflow.training.data.splits import choose, held_out


def load_digits(*, split: str) -> ImageData:
    """1,797 grey images of 8x8 pixels in ten classes: 1,438 for training, 359 for testing.

    The values 0..16 become x / 8 - 1, exactly, as `float32`.

    Args:
        split: train, test or all.

    Source: Alpaydin and Kaynak 1998, the UCI optical recognition data, as scikit-learn ships it.
    """
    require("app", "sklearn")
    from sklearn.datasets import load_digits as load

    digits = load()
    chosen = choose(held_out(len(digits.images)), split)
    images = (digits.images[chosen, None] / 8 - 1).astype(np.float32)
    classes = tuple(str(name) for name in digits.target_names)
    return ImageData("digits", images, digits.target[chosen].astype(np.int64), classes, None)
