"""Why training behaves as it does: sharpness, opposing signals, scale invariance."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "directions": (
            "DirectionalSharpness",
            "Landscape",
            "best_step",
            "curvature_by_losses",
            "directional_sharpness",
            "landscape",
        ),
        "eigenpairs": ("Eigenpair", "lanczos", "power_iteration", "top_eigenpair"),
        "features": ("FeatureResponse", "feature_response"),
        "friction_weights": ("FrictionReport", "FrictionWeights"),
        "groups": ("Groups", "alternation", "extremes", "matched_groups", "random_groups"),
        "heavy": ("HeavyCoordinates", "heavy_coordinates"),
        "hessian": ("Hessian",),
        "looking": ("untouched",),
        "named": ("DIAGNOSES", "diagnoses", "parse_diagnoses"),
        "opposing_signals": ("OpposingReport", "OpposingSignals"),
        "probes": ("FlowProbe", "Probe", "SampleProbe", "sample_losses"),
        "scale_invariance": (
            "Invariance",
            "InvarianceReport",
            "ScaleInvariance",
            "invariance_report",
        ),
        "shadows": ("Shadows", "paper_shadows"),
        "sharpness": ("Sharpness", "SharpnessReport", "block_sharpness", "layers_of"),
        "watch": ("Diagnosis", "Watch"),
        "win_rate": ("WinRate", "WinRateReport"),
    },
)
