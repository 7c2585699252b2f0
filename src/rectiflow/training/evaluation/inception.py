"""Inception features from a local weight file, by torch-fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rectiflow import errors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Inception(nn.Module):
    """The 2048 pooled Inception-v3 features that FID is defined on.

    Nothing is downloaded: the weights are a file at hand. Grey images are repeated to three
    channels; resizing to 299 pixels is torch-fidelity's.

    Args:
        weights: torch-fidelity's converted weights (`weights-inception-2015-12-05-*.pth`).

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        FileNotFoundError: no file at `weights`.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        errors.require("fid", "torch_fidelity")
        if not weights.is_file():
            raise FileNotFoundError(
                f"no Inception weights at {weights}; "
                "pass inception:PATH with torch-fidelity's weight file"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2048"]:
        """Features of images in [-1, 1]."""
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        return self.extractor(pixels)[0]
