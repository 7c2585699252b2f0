"""Networks: any `net(x, t, **condition) -> tensor like x`; these are the built-in ones."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "registry": ("Size", "build", "names", "preset_for", "register", "sizes"),
        "base": ("Net",),
        "embeddings": ("LabelEmbedding", "TimeEmbedding"),
        "blocks": ("ResidualBlock", "SelfAttention"),
        "mlp": ("MLP",),
        "stacked": ("Stacked",),
        "unet": ("UNet",),
    },
)
