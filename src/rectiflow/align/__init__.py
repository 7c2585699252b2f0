"""Move a field toward a reward."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {})
