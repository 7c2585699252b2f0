"""Fewer steps: pairs from a teacher, and the methods that train on them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "generation": ("generate_pairs",),
        "quality": ("PairGate", "PairQuality", "check_pairs"),
    },
)
