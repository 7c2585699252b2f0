"""How near restored images are to the true ones: PSNR and SSIM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rectiflow.errors import require

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def psnr(images: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """The peak signal-to-noise ratio of each image in dB, for images in [-1, 1].

    `10 log10(2² / mean squared error)`; values are cut to [-1, 1] first, as a picture's are.

    Example:
        >>> psnr(torch.full((1, 1, 2, 2), 0.2), torch.zeros(1, 1, 2, 2))
        tensor([20.])
    """
    error = (images.clamp(-1, 1) - truth).flatten(1).square().mean(1)
    return 10 * torch.log10(4 / error)


def ssim(images: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """The structural similarity of each image, by scikit-image, for images in [-1, 1].

    The window has 7 pixels, or as many (an odd number) as the image allows.

    Raises:
        ValueError: images with a side below 3 pixels.
        MissingExtraError: scikit-image is not installed.
    """
    require("data", "skimage")
    from skimage.metrics import structural_similarity

    side = min(7, *truth.shape[-2:])
    if side < 3:
        raise ValueError(f"SSIM needs sides of 3 pixels or more, got {tuple(truth.shape[-2:])}")
    found = [
        structural_similarity(
            a.numpy(), b.numpy(), data_range=2, channel_axis=0, win_size=side - 1 + side % 2
        )
        for a, b in zip(images.clamp(-1, 1).cpu().double(), truth.cpu().double())
    ]
    return torch.tensor(found)
