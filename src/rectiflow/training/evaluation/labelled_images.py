"""What evaluation needs of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class LabelledImages(Protocol):
    """What is needed of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def slug(self) -> str: ...
    @property
    def images(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...

    def batch(self, indices: np.ndarray) -> Tensor:
        """Images as floats in [-1, 1]."""
        ...

    def __len__(self) -> int: ...
