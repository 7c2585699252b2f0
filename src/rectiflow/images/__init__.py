"""Image problems solved with flows: transfer between domains, editing, adaptation."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptation": ("FeatureAdaptation",),
        "degradations": (),
        "editing": ("Edit", "RFEdit", "RoundTrip", "invert", "round_trip"),
        "feature_bank": ("FeatureBank",),
        "fidelity": ("psnr", "ssim"),
        "latent_editing": ("decode", "edit_latent", "encode", "vary"),
        "domain_transfer": ("DomainTransfer", "domain_classifier", "transfer"),
    },
)
