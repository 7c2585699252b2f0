"""What happens to a picture before it is measured: operators with exact adjoints, and noise."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "blurs": ("Blur", "gaussian_kernel", "motion_kernel"),
        "compression": ("JPEG",),
        "linear": ("Composition", "Degradation", "Identity", "LinearOperator", "power_norm"),
        "masks": ("Mask", "box_mask", "read_mask"),
        "noise": ("measure",),
        "resampling": ("Downscale", "Grey"),
        "specs": ("build",),
    },
)
