"""Image problems solved with flows: transfer between domains, editing, adaptation."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptation": ("FeatureAdaptation",),
        "degradations": (),
