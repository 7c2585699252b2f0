"""Other formats and libraries: exported programs, diffusion checkpoints."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "edm": ("edm_times", "from_edm", "from_ve", "from_vp"),
        "export": ("export_sampler",),
    },
)
