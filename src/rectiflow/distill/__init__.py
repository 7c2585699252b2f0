"""Fewer steps: pairs from a teacher, and the methods that train on them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "annealing_reflow": ("AnnealingReflow",),
        "chain": ("ChainSettings", "PairSettings", "TeacherSettings", "make_one_step"),
        "consistency": ("ConsistencyDistillation",),
        "crossing": ("CrossingRisk", "crossing_risk"),
        "deltas": ("add_delta", "weight_delta"),
        "density_ratio": ("Discriminator", "RatioClip", "constant_ratio"),
        "distribution_matching": ("DistributionMatching", "FDistill"),
        "divergences": ("DIVERGENCES", "Divergence"),
        "flow_guided": ("FlowGuidedDistillation",),
        "generation": ("generate_pairs",),
        "inversion": ("invert_pairs",),
        "lora": ("load_lora", "lora_delta", "merge_lora", "save_lora", "with_lora"),
        "methods": ("FewStepMethod", "METHODS", "find_method", "methods_of"),
        "one_step": ("OneStepDistillation",),
        "quality": ("PairGate", "PairQuality", "check_pairs"),
        "ratio_weights": ("RatioWeights",),
        "rectified_diffusion": ("PhasedRectifiedDiffusion", "RectifiedDiffusion"),
        "reflow": ("Reflow",),
        "straightening": ("Profile", "Straightening", "profile"),
        "students": ("new_student",),
        "text_reflow": ("TextReflow",),
    },
)
