"""rectiflow: take a direction, rectify it, step."""

from rectiflow._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, _exports = attach(
    __name__,
    {
        "flows": ("FlowModel", "RectifiedPath", "integrate"),
        "nets": (),
        "vectors": (),
        "optim": (),
        "training": ("FlowMatching", "Trainer"),
        "distill": ("OneStepDistillation", "Reflow", "generate_pairs"),
        "align": (),
        "diagnose": (),
        "guidance": (),
        "images": (),
        "interop": (),
        "recipes": (),
    },
)
__all__ = [*_exports, "__version__"]
