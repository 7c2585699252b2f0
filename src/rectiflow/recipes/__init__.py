"""Runnable experiments, one or two a system, and the catalog of all systems."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, {"catalog": ("SYSTEMS", "System", "bibtex", "find")}
)
