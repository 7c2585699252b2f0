"""Paths, fields, couplings, solvers and their metrics."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptive": ("DormandPrince",),
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
        "tables": ("TablePath",),
        "stochastic": ("StochasticEuler",),
        "couplings": ("Independent", "LivePairs", "MinibatchOT", "Pairs", "StoredPairs"),
        "pair_store": ("PairStore",),
        "premetrics": ("FeatureL2", "L2", "PseudoHuber", "Regression"),
        "times": ("Discrete", "TimeSampler", "Uniform"),
        "analytic": ("GaussianField", "KernelField", "SoftmaxField"),
        "likelihood": ("bits_per_dim", "log_likelihood"),
        "metrics": (),
        "solvers": (),
    },
)
