"""Fewer steps: pairs from a teacher, and the methods that train on them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "chain": ("ChainSettings", "PairSettings", "make_one_step"),
        "deltas": ("add_delta", "weight_delta"),
        "generation": ("generate_pairs",),
        "lora": ("load_lora", "lora_delta", "merge_lora", "save_lora", "with_lora"),
        "one_step": ("OneStepDistillation",),
        "quality": ("PairGate", "PairQuality", "check_pairs"),
        "reflow": ("Reflow",),
        "text_reflow": ("TextReflow",),
    },
)
