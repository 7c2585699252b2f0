"""Directions for weights: direction rules, gradient rectifiers, and optimizers chained of them."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adagrad_norm": ("AdagradNorm",),
        "batch_plan": ("BatchPlan",),
        "batch_sampler": ("ResizableBatches",),
        "batch_size": ("BatchRecord", "BatchSizeController"),
        "batch_tests": ("BatchTest", "InnerProductTest", "NormTest"),
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
        "gradient_statistics": ("GradientStatistics",),
        "layer_search": ("first_layer",),
        "micro_batches": ("MicroBatchStatistics", "rank_statistics"),
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
        "per_sample": ("per_sample_statistics",),
        "pixelwise_clipping": ("PixelwiseClip", "calibrate_threshold"),
        "radial_projection": ("RadialProjection",),
        "score_distillation": ("score_distillation_loss",),
        "sophia": ("Sophia", "SophiaG", "SophiaH"),
        "split_sign": ("SplitSign",),
        "suppression": ("pixel_norms", "pixelwise_clip", "suppress"),
        "tract": ("TrActSettings", "tract_gradient"),
        "tract_layers": (
            "TrActConv1d",
            "TrActConv2d",
            "TrActConv3d",
            "TrActLinear",
            "apply_tract",
            "remove_tract",
        ),
        "whole_gradients": ("CentreGradients", "ClipNorm"),
    },
)
