"""A texture seen through a frozen encoder, trained by noisy gradients of the encoder's latents.

What score distillation does to a textured object, without the diffusion model: views of the texture
are drawn, encoded, and told in which direction their latents should move. An encoder whose backward
pass has outliers is emulated by amplifying the gradient at a few places of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rectiflow.optim import PixelwiseClip, calibrate_threshold, score_distillation_loss, suppress


@dataclass(frozen=True)
class Lab:
    """Textures and the encoder that looks at them.

    Attributes:
        encoder: from views to latents, frozen.
        targets: textures to be found, in [-1, 1], square.
        view: side of a view in pixels.
        views: views a step.
        noise: standard deviation of the noise in a latent's gradient.
        share: share of a view's pixels whose gradient is amplified.
        gain: by how much.
        steps: steps of a training.
    """

    encoder: nn.Module
    targets: Tensor
    view: int
    views: int
    noise: float
    share: float
    gain: float
    steps: int


@dataclass(frozen=True)
class Arm:
    """One way to hold gradients down.

    Attributes:
        suppression: see `rectiflow.optim.suppress`.
        norm: length of a pixel's gradient.
        latent: bound the gradient of the latents, before the encoder's backward pass.
    """

    suppression: str = "none"
    norm: str = "linf"
    latent: bool = False


@dataclass(frozen=True)
class Painted:
    """What one training gave.

    Attributes:
        texture: the texture.
        psnr: its peak signal-to-noise ratio against the target, in dB.
        roughness: variance of its Laplacian over that of the target.
        largest: the longest gradient of a pixel, before it is bounded, at each step.
        clipped: share of the pixels (or latents) that were longer than the bound.
        turned: mean angle by which the bound turned the gradients of pixels it changed, in degrees.
    """

    texture: Tensor
    psnr: float
    roughness: float
    largest: tuple[float, ...]
    clipped: float
    turned: float


def train_autoencoder(images: Tensor, *, steps: int, seed: int = 0) -> nn.Module:
    """The encoder of a small convolutional autoencoder, frozen: four latents for 4 by 4 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(32, 4, 3, 1, 1),
        )  # fmt: skip
        decoder = nn.Sequential(
            nn.Conv2d(4, 32, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1),
        )  # fmt: skip
    both = nn.Sequential(encoder, decoder)
    optimizer = torch.optim.Adam(both.parameters(), 2e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = images[torch.randint(len(images), (16,), generator=draw)]
        optimizer.zero_grad()
        functional.mse_loss(both(x), x).backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)


def paint(lab: Lab, arm: Arm, *, rate: float, factor: float, stressed: bool, seed: int) -> Painted:
    """Train a texture by SGD with momentum; seed, not arm, decides target, views and noise.

    The bound is `factor` times the median length of what it bounds in five steps before the first;
    for the whole gradient it is the length of as many median pixels.
    """
    target = lab.targets[seed % len(lab.targets)][None]
    # The same places whatever the seed: they belong to the encoder.
    places = torch.rand(lab.view, lab.view, generator=torch.Generator().manual_seed(0)) < lab.share
    spikes = torch.where(places & stressed, lab.gain, 1.0)
    texture = torch.zeros_like(target, requires_grad=True)
    bound = math.inf
    clip = PixelwiseClip(bound, suppression=arm.suppression, norm=arm.norm)
    met: list[Tensor] = []

    def spiked(gradient: Tensor) -> Tensor:
        met.append(gradient * spikes)
        return met[-1]

    def gradient(draw: torch.Generator) -> Tensor:
        """The texture's gradient in the views of one step."""
        grid = _grid(lab, draw)
        views = _look(texture, grid)
        seen = views if arm.latent else clip(views)
        # A tensor of its own: hooks of one tensor run in order, and spikes come before the bound.
        judged = seen.view_as(seen)
        judged.register_hook(spiked)
        latents = lab.encoder(judged)
        with torch.no_grad():
            away = latents - lab.encoder(_look(target, grid))
            away += lab.noise * torch.randn(away.shape, generator=draw)
        loss = score_distillation_loss(clip(latents) if arm.latent else latents, away)
        return torch.autograd.grad(loss, texture)[0]

    if arm.suppression != "none":
        before = torch.Generator().manual_seed(seed)
        median = calibrate_threshold(clip, lambda: gradient(before), steps=5, q=0.5)
        pixels = lab.views * lab.view**2 if arm.suppression == "global-norm" else 1
        clip.threshold = bound = factor * median * math.sqrt(pixels)
    draw = torch.Generator().manual_seed(seed)
    speed, largest, clipped = torch.zeros_like(target), [], []
    for _ in range(lab.steps):
        met.clear()
        speed = 0.9 * speed + gradient(draw)
        with torch.no_grad():
            texture.sub_(rate * speed).clamp_(-1, 1)
        largest.append(float(met[0].abs().amax()))
        clipped.append(clip.last.fraction if clip.last is not None else 0.0)
    found, last = texture.detach(), met[0]
    error = float((found - target).square().mean())
    return Painted(
        found[0],
        10 * math.log10(4 / max(error, 1e-12)),
        _roughness(found) / _roughness(target),
        tuple(largest),
        sum(clipped) / len(clipped),
        0.0 if arm.latent else _turn(last, suppress(last, bound, arm.suppression, norm=arm.norm)),
    )


def _grid(lab: Lab, draw: torch.Generator) -> Tensor:
    """Where the pixels of random views lie: turned, shifted, from a third to two thirds wide."""
    angle = 0.35 * (2 * torch.rand(lab.views, generator=draw) - 1)
    width = 0.35 + 0.3 * torch.rand(lab.views, generator=draw)
    shift = (2 * torch.rand(lab.views, 2, generator=draw) - 1) * (1 - width[:, None])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    affine = torch.cat([turn * width[:, None, None], shift[:, :, None]], 2)
    return functional.affine_grid(affine, [lab.views, 3, lab.view, lab.view], align_corners=False)


def _look(texture: Tensor, grid: Tensor) -> Tensor:
    """The views of a texture."""
    whole = texture.expand(len(grid), -1, -1, -1)
    return functional.grid_sample(whole, grid, padding_mode="border", align_corners=False)


def _roughness(image: Tensor) -> float:
    """Variance of the Laplacian."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return float(functional.conv2d(image, kernel, groups=3).var())


def _turn(before: Tensor, after: Tensor) -> float:
    """Mean angle between the colours of gradients, in degrees, where they differ."""
    changed = (before != after).any(1)
    if not changed.any():
        return 0.0
    same = functional.cosine_similarity(before.double(), after.double(), eps=1e-30)
    return float(same[changed].clamp(-1, 1).acos().rad2deg().mean())
