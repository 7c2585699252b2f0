"""Scenes that a frozen flow draws, by score distillation; so far in two dimensions."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "painting": ("Painted", "paint"),
        "score_distillation": ("ScoreDistillation",),
    },
)
