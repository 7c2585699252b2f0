"""The shared kernel: inner products, parallel/orthogonal splits, clips and balances."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "batchwise": (
            "Split",
            "balance",
            "combine",
            "cosine",
            "inner",
            "norm",
            "rescale",
            "split_parallel",
        ),
        "clips": ("clip_norm", "clip_pixels", "clip_value"),
        "flat": ("Segments", "segment_inner", "segment_norm", "segment_split_parallel"),
    },
)
