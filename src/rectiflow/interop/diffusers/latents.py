"""Images to scaled latents and back, with a pipeline's VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rectiflow.errors import positive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def encode_images(
    pipe: Any,
    images: Float[Tensor, "b c h w"],
    *,
    batch_size: int = 4,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b k y x"]:
    """Latents of images in [-1, 1], shifted and scaled as the pipeline's network knows them.

    Gradients flow to images that require them, for score distillation; otherwise there is no graph.

    Args:
        pipe: the pipeline.
        images: floats in [-1, 1] with sides that are multiples of its VAE's factor.
        batch_size: images encoded together.
        generator: draws from the VAE's posterior; its mode is taken without one.

    Raises:
        ValueError: images of sides the VAE cannot encode.
    """
    positive("batch_size", batch_size)
    if any(side % pipe.vae_scale_factor for side in images.shape[2:]):
        raise ValueError(
            f"images must have sides in multiples of {pipe.vae_scale_factor}, got "
            f"{tuple(images.shape[2:])}: resize or crop them"
        )
    mean, scale = _scaling(pipe.vae)
    parts = []
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        for part in images.split(batch_size):
            found = pipe.vae.encode(part.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
            latents = found.mode() if generator is None else found.sample(generator)
            parts.append((latents - mean.to(latents)) * scale.to(latents))
    return torch.cat(parts)


def decode_latents(
    pipe: Any, latents: Float[Tensor, "b k y x"], *, batch_size: int = 4
) -> Float[Tensor, "b c h w"]:
    """Images, about in [-1, 1], of scaled latents; gradients flow through, for perceptual losses.

    Args:
        pipe: the pipeline.
        latents: what a model of `from_pipeline` makes.
        batch_size: latents decoded together.
    """
    positive("batch_size", batch_size)
    mean, scale = _scaling(pipe.vae)
    parts = []
    for part in latents.split(batch_size):
        part = part.to(pipe.vae.device, pipe.vae.dtype)
        parts.append(pipe.vae.decode(part / scale.to(part) + mean.to(part), return_dict=False)[0])
    return torch.cat(parts)


def _scaling(vae: Any) -> tuple[Tensor, Tensor]:
    """What is subtracted from the VAE's latents, and what they are multiplied by."""
    config = vae.config
    mean, spread = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and spread is not None:
        shape = (1, -1, 1, 1)
        factor = config.scaling_factor / torch.tensor(spread, dtype=torch.float32)
        return torch.tensor(mean, dtype=torch.float32).view(shape), factor.view(shape)
    return torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(config.scaling_factor)
