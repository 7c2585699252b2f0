"""Fewer steps: pairs from a teacher, and the methods that train on them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "chain": ("ChainSettings", "TeacherSettings", "make_one_step"),
        "density_ratio": ("Discriminator", "RatioClip", "constant_ratio"),
        "distribution_matching": ("DistributionMatching", "FDistill"),
        "divergences": ("DIVERGENCES", "Divergence"),
        "generation": ("generate_pairs",),
        "one_step": ("OneStepDistillation",),
        "quality": ("PairGate", "PairQuality", "check_pairs"),
        "ratio_weights": ("RatioWeights",),
        "reflow": ("Reflow",),
    },
)
