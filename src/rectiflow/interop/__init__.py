"""Other formats and libraries: exported programs, diffusers pipelines."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"diffusers": (), "export": ("export_sampler",)})
