"""Paths, fields, couplings, solvers and their metrics."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adaptive": ("DormandPrince",),
        "compiled": ("CompiledSampler",),
        "data_premetrics": ("DataPseudoHuber", "NoiseL2"),
        "fields": ("Counted", "Field", "FlowModel"),
        "first_order": ("FirstOrder", "first_order_jump"),
        "integration": ("Step", "Trajectory", "integrate", "uniform_times"),
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
        "phased": ("PhasedPairs",),
        "sampling": ("sample",),
        "schedules": ("SchedulePath",),
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
