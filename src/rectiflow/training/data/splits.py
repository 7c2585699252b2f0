"""Which images are for training and which for testing, the same on every machine."""

from __future__ import annotations

import numpy as np

TEST_FRACTION = 0.2
SPLITS = ("train", "test", "all")


def held_out(count: int) -> np.ndarray:
    """Mark a fifth of `count` items, scattered evenly, as test items.

    The order is that of sorting the raw output of a PCG64 generator with a fixed seed. NumPy
    promises to keep that stream, which it does not for `permutation`.

    Example:
        >>> int(held_out(1797).sum())
        359
    """
    order = np.argsort(np.random.PCG64(0).random_raw(count), kind="stable")
    mask = np.zeros(count, bool)
    mask[order[: round(TEST_FRACTION * count)]] = True
    return mask


def choose(mask: np.ndarray, split: str) -> np.ndarray:
    """The positions of a split in order, given the mask of the test items."""
    if split == "all":
        return np.arange(len(mask))
    return np.flatnonzero(mask if split == "test" else ~mask)
