"""Conditions of batches that several states of each sample share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def repeated(condition: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The condition of a batch stacked several times; what has no rows is shared.

    Example:
        >>> repeated({"label": torch.tensor([3, 4]), "size": 64}, 2)
        {'label': tensor([3, 4, 3, 4]), 'size': 64}
    """
    return {
        name: torch.cat([value] * times) if isinstance(value, Tensor) and value.ndim else value
        for name, value in condition.items()
    }
