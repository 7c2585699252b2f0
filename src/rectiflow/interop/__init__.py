"""Other formats and libraries: exported programs, weights of Stable Diffusion 3."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"export": ("export_sampler",), "sd3": ()})
