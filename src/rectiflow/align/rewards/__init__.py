"""Rewards: callables `reward(images, **condition) -> (b,)` that samplers are aligned with."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "checked": ("Checked", "Reward"),
        "classifier": ("Classifier", "fit_linear"),
        "compressibility": ("Compressibility",),
        "mixture": ("RewardMix",),
        "pixels": ("Brightness", "unit_range"),
        "specs": ("parse_reward", "parse_rewards"),
        "vision": ("Aesthetic", "AestheticHead", "ClipScore", "load_clip"),
    },
)
