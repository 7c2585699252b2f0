"""Paths by name, as models keep them in their configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rectiflow.errors import unknown
from rectiflow.flows.diffusion_paths import (
    ConstantSpeedVPPath,
    CosinePath,
    EDMPath,
    SubVPPath,
    VarianceExplodingPath,
    VariancePreservingPath,
)
from rectiflow.flows.paths import PacedPath, Path, RectifiedPath
from rectiflow.flows.schedules import SchedulePath
from rectiflow.flows.tables import TablePath

# Those that can be had by their name alone.
PATHS: dict[str, type[Path]] = {
    kind.name: kind
    for kind in (
        RectifiedPath,
        VariancePreservingPath,
        SubVPPath,
        CosinePath,
        EDMPath,
        VarianceExplodingPath,
        ConstantSpeedVPPath,
        PacedPath,
    )
}
# Those that belong to somebody's weights: nothing that decides their noise levels has a default.
DISCRETE: dict[str, type[Path]] = {kind.name: kind for kind in (SchedulePath, TablePath)}


def build(name: str, **config: Any) -> Path:
    """The path of a name and its parameters, as stored in a model's configuration.

    Raises:
        ValueError: an unknown name, or parameters that the path does not take.

    Example:
        >>> build("edm", sigma_max=10.0)
        EDMPath(sigma_min=0.002, sigma_max=10.0, rho=7.0)
        >>> build("table", alpha_bar=[0.9, 0.1]).count
        2
    """
    known = {**PATHS, **DISCRETE}
    if name not in known:
        raise unknown("path", name, known)
    try:
        return known[name](**config)
    except TypeError:
        accepted = ", ".join(f.name for f in fields(known[name])) or "no parameters"
        given = ", ".join(config) or "none"
        raise ValueError(f"path {name!r} takes {accepted}, got {given}") from None
