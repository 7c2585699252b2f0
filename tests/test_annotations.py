"""The import hook of conftest.py: shapes in annotations are checked, in tests only."""

import jaxtyping
import pytest
import torch

from rectiflow.flows import RectifiedPath, integrate
from rectiflow.flows.paths import expand


def test_wrong_shape_raises():
    # Broadcasting would accept the single time; the annotation asks for one a sample.
    path, x = RectifiedPath(), torch.zeros(3, 2)
    with pytest.raises(jaxtyping.TypeCheckError):
        path.interpolate(x, x, torch.zeros(1))


def test_wrong_type_raises():
    with pytest.raises(jaxtyping.TypeCheckError):
        expand([0.5], torch.zeros(1, 2))


def test_refusals_of_the_library_come_first():
    with pytest.raises(ValueError, match="states must be floating point"):
        integrate(lambda x, t: x, torch.zeros(3, 2, dtype=torch.int64))
