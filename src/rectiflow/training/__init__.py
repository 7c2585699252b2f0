"""The training loop, data, averaging, checkpoints, evaluation and reports."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "averaging": ("EMA",),
        "checkpoints": (),
        "data": ("ImageData",),
        "denoising": ("Denoising",),
        "evaluation": ("Evaluator",),
        "flow_matching": ("FlowMatching",),
        "method": ("Method", "Phase"),
        "optimizers": ("OptimizerSettings",),
        "progress": (),
        "runs": ("Run",),
        "trainer": ("Trainer", "TrainerSettings"),
    },
)
