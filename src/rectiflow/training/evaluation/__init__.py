"""How good samples are: Fréchet distances with their floor, precision and recall."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "evaluator": ("Evaluator", "Scores"),
        "features": ("Features", "load_features"),
        "frechet": ("Moments", "frechet_distance"),
        "manifold": ("PrecisionRecall", "precision_recall"),
    },
)
