"""Networks: any `net(x, t, **condition) -> tensor like x`; these are the built-in ones."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "registry": ("Size", "build", "names", "preset_for", "register", "sizes"),
        "base": ("Net",),
        "costs": ("Cost", "cost", "macs"),
        "embeddings": ("LabelEmbedding", "TimeEmbedding"),
        "blocks": ("ResidualBlock", "SelfAttention"),
        "diffusion": ("DiffusionVelocity",),
        "mlp": ("MLP",),
        "mmdit": ("MMDiT",),
        "joint_blocks": ("JointBlock",),
        "specs": ("build_spec",),
        "stacked": ("Stacked",),
        "unet": ("UNet",),
    },
)
