"""Data by spec string: digits, Fashion-MNIST, photographs, folders, tables, arrays."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "idx": ("find_fashion_mnist",),
        "image_data": ("ImageData",),
        "loading": ("SOURCES", "Source", "load", "parse"),
    },
)
