"""Paths, fields, couplings, solvers and their metrics."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptive": ("DormandPrince",),
        "adaptive_grid": ("adaptive_times",),
        "compiled": ("CompiledSampler",),
        "fields": ("Counted", "Field", "FlowModel"),
        "guidance": ("ClassifierFree", "SkipLayers"),
        "integration": ("Step", "Trajectory", "integrate", "uniform_times"),
        "paths": (
            "ConstantSpeedVPPath",
            "CosinePath",
            "EDMPath",
            "PacedPath",
            "Path",
            "RectifiedPath",
            "SubVPPath",
            "VarianceExplodingPath",
            "VariancePreservingPath",
        ),
        "sampling": ("sample",),
        "snr_times": ("CosMap", "LogitNormal", "Mode", "from_diffusers_args"),
        "text_dropout": ("SD3_ENCODERS", "EncoderDropout", "EncoderPart"),
        "time_shift": ("TimeShift", "resolution_shift", "shift_times", "shifted_times"),
        "stochastic": ("StochasticEuler",),
        "couplings": ("Independent", "LivePairs", "MinibatchOT", "Pairs", "StoredPairs"),
        "inverted_pairs": ("InvertedPairs",),
        "pair_store": ("PairStore",),
        "perceptual": ("FeatureDistance", "Perceptual", "PerceptualHuber", "lpips_distance"),
        "premetrics": ("FeatureL2", "L2", "PseudoHuber", "Regression"),
        "reinterpolation": ("Reinterpolation",),
        "root_mean_square": ("RootMeanSquare",),
        "times": ("Discrete", "TimeSampler", "Uniform"),
        "u_shaped": ("UShaped",),
        "analytic": ("GaussianField", "KernelField", "SoftmaxField"),
        "likelihood": ("bits_per_dim", "log_likelihood"),
        "metrics": (),
        "solvers": (),
    },
)
