"""Paths, fields, couplings, solvers and their metrics."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptive": ("DormandPrince",),
        "adaptive_grid": ("adaptive_times",),
        "analytic": (
            "GaussianField",
            "KernelField",
            "SoftmaxField",
        ),
        "compiled": ("CompiledSampler",),
        "couplings": (
            "Independent",
            "LivePairs",
            "MinibatchOT",
            "Pairs",
            "StoredPairs",
        ),
        "data_premetrics": (
            "DataPseudoHuber",
            "NoiseL2",
        ),
        "fields": (
            "Counted",
            "Field",
            "FlowModel",
        ),
        "first_order": (
            "FirstOrder",
            "first_order_jump",
        ),
        "guidance": (
            "ClassifierFree",
            "SkipLayers",
        ),
        "integration": (
            "Step",
            "Trajectory",
            "integrate",
            "uniform_times",
        ),
        "inverted_pairs": ("InvertedPairs",),
        "likelihood": (
            "bits_per_dim",
            "log_likelihood",
        ),
        "metrics": (),
        "pair_store": ("PairStore",),
        "paired_gaussian": ("PairedGaussian",),
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
        "perceptual": (
            "FeatureDistance",
            "Perceptual",
            "PerceptualHuber",
            "lpips_distance",
        ),
        "phased": ("PhasedPairs",),
        "premetrics": (
            "FeatureL2",
            "L2",
            "PseudoHuber",
            "Regression",
        ),
        "reinterpolation": ("Reinterpolation",),
        "root_mean_square": ("RootMeanSquare",),
        "sampling": ("sample",),
        "schedules": ("SchedulePath",),
        "snr_times": (
            "CosMap",
            "LogitNormal",
            "Mode",
            "from_diffusers_args",
        ),
        "solvers": (),
        "stochastic": ("StochasticEuler",),
        "text_dropout": (
            "EncoderDropout",
            "EncoderPart",
            "SD3_ENCODERS",
        ),
        "time_shift": (
            "TimeShift",
            "resolution_shift",
            "shift_times",
            "shifted_times",
        ),
        "times": (
            "Discrete",
            "TimeSampler",
            "Uniform",
        ),
        "u_shaped": ("UShaped",),
    },
)
