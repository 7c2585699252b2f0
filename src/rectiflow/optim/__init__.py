"""Directions for weights: direction rules, gradient rectifiers, and optimizers chained of them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adagrad_norm": ("AdagradNorm",),
        "chained": ("ChainedOptimizer", "chain"),
        "coordinate_clipping": ("ClipCoordinates", "clip_coordinates_", "top_threshold"),
        "curvature": (
            "hutchinson",
            "sampled_cross_entropy",
            "sampled_squared_error",
            "statistics_kept",
        ),
        "directions": ("Adagrad", "Adam", "Lion", "Momentum"),
        "friction": ("Friction",),
        "named": (
            "AdAdaGrad",
            "AdAdaGradNorm",
            "AdamP",
            "CoordinateClipped",
            "DiffGrad",
            "SGDP",
            "SplitSGD",
        ),
        "parts": ("Direction", "Part"),
        "radial_projection": ("RadialProjection",),
        "sophia": ("Sophia", "SophiaG", "SophiaH"),
        "split_sign": ("SplitSign",),
        "whole_gradients": ("CentreGradients", "ClipNorm"),
    },
)
