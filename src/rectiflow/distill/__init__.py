"""Fewer steps: pairs from a teacher, and the methods that train on them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "annealing_reflow": ("AnnealingReflow",),
        "chain": ("ChainSettings", "TeacherSettings", "make_one_step"),
        "flow_guided": ("FlowGuidedDistillation",),
        "generation": ("generate_pairs",),
        "methods": ("METHODS", "FewStepMethod", "find_method", "methods_of"),
        "one_step": ("OneStepDistillation",),
        "quality": ("PairGate", "PairQuality", "check_pairs"),
        "reflow": ("Reflow",),
        "students": ("new_student",),
    },
)
