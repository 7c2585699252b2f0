"""Bend a trained field while it is sampled: guidance, steering, views, relations."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "apg": ("APG", "projected_guidance", "rectify"),
        "costs": ("Classifier", "Cost", "Custom", "Decoded", "LinearInverse", "Masked"),
        "flowchef": ("FlowChef",),
        "presets": ("preset",),
        "rectiflow.flows.guidance": ("ClassifierFreeGuidance", "SkipLayers"),
        "region_editing": ("RegionalField", "edit_region", "latent_mask"),
        "specs": ("parse_guidance",),
    },
)
