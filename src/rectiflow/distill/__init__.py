"""Fewer steps: pairs from a teacher, and the methods that train on them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "chain": (
            "ChainSettings",
            "TeacherSettings",
            "make_one_step",
        ),
        "consistency": ("ConsistencyDistillation",),
        "crossing": (
            "CrossingRisk",
            "crossing_risk",
        ),
        "generation": ("generate_pairs",),
        "inversion": ("invert_pairs",),
        "one_step": ("OneStepDistillation",),
        "quality": (
            "PairGate",
            "PairQuality",
            "check_pairs",
        ),
        "rectified_diffusion": (
            "PhasedRectifiedDiffusion",
            "RectifiedDiffusion",
        ),
        "reflow": ("Reflow",),
        "straightening": (
            "Profile",
            "Straightening",
            "profile",
        ),
    },
)
