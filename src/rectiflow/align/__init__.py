"""Move a field toward a reward."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adapters": ("gaussian_lora", "mix_adapters", "scale_adapter"),
        "align_prop": ("AlignProp",),
        "chain": ("sample_with_gradient",),
        "live_memory": ("peak_bytes",),
        "monitor": ("EarlyStop", "RewardCurve", "diversity", "measure"),
        "regularizers": ("FieldDrift", "RangePenalty", "Regularizer", "Rollout"),
        "reinforce": ("Reinforce",),
        "rewards": (),
        "truncation": ("Fixed", "LastK", "Normal", "Truncation", "Uniform", "parse_truncation"),
    },
)
