"""Other formats and libraries: exported programs, diffusion checkpoints, diffusers pipelines."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "diffusers": (),
        "edm": ("edm_times", "from_edm", "from_ve", "from_vp"),
        "export": ("export_sampler",),
        "sd3": (),
    },
)
