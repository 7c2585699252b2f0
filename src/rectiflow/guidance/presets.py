"""Settings of adaptive projected guidance by model family."""

from __future__ import annotations

from typing import Any

from rectiflow.errors import unknown

# The settings of the appendix of arXiv 2410.02416. Those of SDXL agree with a second source; the
# norms and momenta of the others could not be checked against one. Norms are in units of each
# model's own latents, at its own size.
PRESETS: dict[str, dict[str, float]] = {
    "edm2-s": {"scale": 4.0, "eta": 0.0, "norm": 2.5, "momentum": -0.75},
    "edm2-xxl": {"scale": 2.0, "eta": 0.0, "norm": 2.5, "momentum": -0.75},
    "dit-xl-2": {"scale": 4.0, "eta": 0.0, "norm": 5.0, "momentum": -0.5},
    "sd-2.1": {"scale": 10.0, "eta": 0.0, "norm": 7.5, "momentum": -0.75},
    "sdxl": {"scale": 15.0, "eta": 0.0, "norm": 15.0, "momentum": -0.5},
}


def preset(family: str) -> dict[str, Any]:
    """The settings of `APG` for a model family.

    Args:
        family: edm2-s, edm2-xxl, dit-xl-2, sd-2.1 or sdxl.

    Returns:
        keyword arguments of `APG`: `APG(model, **preset("sdxl"))`.

    Raises:
        ValueError: an unknown family.

    Example:
        >>> preset("sdxl")["norm"]
        15.0
    """
    if family not in PRESETS:
        raise unknown("preset of guidance", family, PRESETS)
    return dict(PRESETS[family])
