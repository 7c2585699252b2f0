"""Pixel-wise clipping: the bound, the direction, the place in a graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rectiflow.optim import (
    PixelwiseClip,
    calibrate_threshold,
    pixel_norms,
    pixelwise_clip,
    score_distillation_loss,
    suppress,
)
from rectiflow.optim.suppression import SUPPRESSIONS
from rectiflow.vectors import cosine

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def gradient(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Gradients whose pixels are of very different lengths, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape or (2, 3, 5, 4), generator=generator, dtype=torch.float64)
    g = g * torch.randn(g.shape[0], 1, *g.shape[2:], generator=generator, dtype=g.dtype).exp()
    g[0, :, 0, 0] = 0
    return g.to(dtype)


def looped(g: torch.Tensor, c: float, norm: str) -> torch.Tensor:
    """Pixel by pixel."""
    out = g.clone()
    for b in range(g.shape[0]):
        for i in range(g.shape[2]):
            for j in range(g.shape[3]):
                v = g[b, :, i, j]
                size = float(v.abs().max()) if norm == "linf" else float(v.square().sum().sqrt())
                if size > c:
                    out[b, :, i, j] = v * c / size
    return out


# Oracle


@NORMS
@pytest.mark.parametrize("c", [0.0, 0.3, 1.0, math.inf])
def test_equals_the_loop_over_pixels(norm, c) -> None:
    g = gradient(dtype=torch.float64)
    torch.testing.assert_close(
        pixelwise_clip(g, c, norm=norm), looped(g, c, norm), rtol=1e-14, atol=0
    )


def test_released_code() -> None:
    g = gradient()
    ratio = (0.2 / g.abs()).clamp(max=1).amin(1, keepdim=True)
    torch.testing.assert_close(pixelwise_clip(g, 0.2), g * ratio)


@pytest.mark.parametrize(
    "kind, formula",
    [
        ("value", lambda g, c: g.clamp(-c, c)),
        ("global", lambda g, c: g * c / g.abs().max()),
        ("global-norm", lambda g, c: g * c / g.norm()),
        ("soft", lambda g, c: c * g / (g.abs() + c)),
        ("pixel-soft", lambda g, c: c * g / (g.abs().amax(1, keepdim=True) + c)),
        ("tanh", lambda g, c: c * (2 * torch.sigmoid(2 * g / c) - 1)),
        ("drop", lambda g, c: g * (g.abs().amax(1, keepdim=True) <= c)),
        ("none", lambda g, c: g),
    ],
)
def test_other_suppressions(kind, formula) -> None:
    g = gradient(dtype=torch.float64)
    torch.testing.assert_close(suppress(g, 0.4, kind), formula(g, 0.4), rtol=1e-12, atol=1e-15)


# Limits


def test_bounds_that_let_all_or_nothing_through() -> None:
    g = gradient()
    assert torch.equal(pixelwise_clip(g, math.inf), g)
    assert torch.equal(pixelwise_clip(g, 0.0), torch.zeros_like(g))
    for kind in SUPPRESSIONS:
        assert torch.equal(suppress(g, math.inf, kind), g)


@NORMS
def test_one_channel_is_a_clamp(norm) -> None:
    g = gradient(2, 1, 4, 4)
    torch.testing.assert_close(
        pixelwise_clip(g, 0.5, norm=norm), g.clamp(-0.5, 0.5), rtol=1e-6, atol=0
    )


def test_norms_agree_on_pure_colours() -> None:
    g = gradient()
    g[:, 1:] = 0
    torch.testing.assert_close(
        pixelwise_clip(g, 0.4, norm="linf"), pixelwise_clip(g, 0.4, norm="l2"), rtol=1e-6, atol=0
    )


# Properties


@NORMS
def test_bounded_in_length_and_true_to_direction(norm) -> None:
    g, c = gradient(), 0.3
    out = pixelwise_clip(g, c, norm=norm)
    before, after = pixel_norms(g, norm=norm), pixel_norms(out, norm=norm)
    assert after.max() <= c * (1 + 1e-6)
    assert (before > c).any()
    assert (before <= c).any()
    kept = (before <= c)[:, None].expand_as(g)
    assert torch.equal(out[kept], g[kept])
    turned = cosine(out.movedim(1, -1), g.movedim(1, -1), start=3)
    assert (turned[before > 0] > 1 - 1e-6).all()
    again = pixelwise_clip(out, c, norm=norm)
    torch.testing.assert_close(again, out, rtol=3e-7, atol=0)


def test_two_norm_clips_more_than_the_largest_channel() -> None:
    g, c = gradient(), 0.3
    two, most = (pixel_norms(pixelwise_clip(g, c, norm=norm), norm="l2") for norm in ("l2", "linf"))
    assert (two <= most * (1 + 1e-6)).all()
    assert (most <= 3**0.5 * c * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", SUPPRESSIONS)
def test_scale_and_bound_commute(kind) -> None:
    g = gradient()
    one, scaled = suppress(g, 0.3, kind), suppress(1024 * g, 1024 * 0.3, kind)
    torch.testing.assert_close(scaled, 1024 * one, rtol=1e-6, atol=0)
    for zero in (suppress(torch.zeros_like(g), 0.3, kind), suppress(0 * g, 0.0, kind)):
        assert torch.equal(zero, torch.zeros_like(g))
    assert suppress(g.half(), 0.3, kind).dtype is torch.float16


def test_channels_may_lie_anywhere_and_images_do_not_meet() -> None:
    g = gradient()
    last = g.movedim(1, -1)
    assert torch.equal(
        pixelwise_clip(last, 0.3, channel_dim=-1), pixelwise_clip(g, 0.3).movedim(1, -1)
    )
    assert torch.equal(
        pixelwise_clip(last[1], 0.3, channel_dim=-1), pixelwise_clip(g, 0.3)[1].movedim(0, -1)
    )
    assert torch.equal(pixelwise_clip(g[1:], 0.3), pixelwise_clip(g, 0.3)[1:])
    kept = g.clone()
    pixelwise_clip(g, 0.3)
    assert torch.equal(g, kept)


def test_overflow_is_not_hidden() -> None:
    g = gradient()
    g[0, 1, 2, 2], g[1, 0, 0, 0] = math.inf, math.nan
    out = pixelwise_clip(g, 0.3)
    assert out[0, 1, 2, 2].isnan()
    assert out[1, 0, 0, 0].isnan()
    assert out.isnan().sum() == 2


# In a graph


def test_only_its_branch_is_clipped() -> None:
    weight = torch.randn(1, 3, 4, 4, requires_grad=True)
    image = weight * 1
    image.retain_grad()
    clip, g = PixelwiseClip(0.3), gradient(1, 3, 4, 4)
    branch = clip(image)
    assert torch.equal(branch, image)
    ((branch * g).sum() + (image * 5).sum()).backward()
    torch.testing.assert_close(weight.grad, pixelwise_clip(g, 0.3) + 5)
    assert clip(image.detach()) is not None
    assert not clip(image.detach()).requires_grad


def test_several_backward_passes_and_statistics() -> None:
    image, g = torch.zeros(1, 3, 4, 4, requires_grad=True), gradient(1, 3, 4, 4)
    clip = PixelwiseClip(0.3)
    assert clip.last is None
    loss = (clip(image) * g).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(image.grad, 2 * pixelwise_clip(g, 0.3))
    sizes = pixel_norms(g)
    assert clip.last.fraction == pytest.approx(float((sizes > 0.3).float().mean()))
    assert clip.last.threshold == pytest.approx(0.3)
    assert clip.last.largest == pytest.approx(float(sizes.max()))
    assert "threshold=0.3, suppression=pixel, norm=linf" in repr(clip)


def test_quantile_clips_its_share_whatever_the_scale() -> None:
    g = gradient(4, 3, 10, 10)
    g[:, :, :5] = 0  # background, which does not count
    some = (pixel_norms(g) > 0).sum()
    for factor in (1.0, 1e-4):
        image = torch.zeros_like(g, requires_grad=True)
        clip = PixelwiseClip("quantile:0.9", norm="linf")
        (clip(image) * g * factor).sum().backward()
        assert clip.last.fraction == pytest.approx(int(some * 0.1) / 400)
        torch.testing.assert_close(
            image.grad / factor, pixelwise_clip(g, clip.last.threshold / factor)
        )
    empty = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (PixelwiseClip("quantile:0.9")(empty) * 0).sum().backward()
    assert torch.equal(empty.grad, torch.zeros_like(empty))


def test_calibration_watches_and_sets() -> None:
    image = torch.zeros(2, 3, 5, 4, requires_grad=True)
    clip, seeds = PixelwiseClip("quantile:0.5"), iter(range(3))

    def backward() -> None:
        (clip(image) * gradient(seed=next(seeds))).sum().backward()

    found = calibrate_threshold(clip, backward, steps=3, q=0.8)
    torch.testing.assert_close(image.grad, sum(gradient(seed=s) for s in range(3)))
    sizes = torch.cat([pixel_norms(gradient(seed=s)).flatten() for s in range(3)])
    assert float((sizes[sizes > 0] > found).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert clip.threshold == found
    other = PixelwiseClip()
    other.load_state_dict(clip.state_dict())
    assert (other.threshold, other._quantile) == (found, None)
    other.load_state_dict(PixelwiseClip("quantile:0.9").state_dict())
    assert other._quantile == 0.9
    image.grad = None
    (clip(image) * gradient()).sum().backward()
    torch.testing.assert_close(image.grad, pixelwise_clip(gradient(), found))
    with pytest.raises(ValueError, match="no gradient went through"):
        calibrate_threshold(clip, lambda: None)


def test_gradient_scaler_changes_nothing() -> None:
    g = gradient(1, 3, 4, 4)
    found = []
    for enabled in (False, True):
        weight = nn.Parameter(torch.ones(1, 3, 4, 4))
        optimizer = torch.optim.SGD([weight], 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        clip = PixelwiseClip(0.3, scale=scaler.get_scale)
        scaler.scale((clip(weight * 2) * g).sum()).backward()
        assert clip.last.largest == pytest.approx(float(pixel_norms(g).max()))
        scaler.unscale_(optimizer)
        found.append(weight.grad.clone())
    torch.testing.assert_close(found[0], 2 * pixelwise_clip(g, 0.3))
    torch.testing.assert_close(found[1], found[0])


def test_behind_a_linear_encoder() -> None:
    matrix = torch.randn(6, 3 * 4 * 4)
    target = torch.randn(1, 6)
    for factor in (1.0, 256.0):  # without and with a loss scale
        image = torch.zeros(1, 3, 4, 4, requires_grad=True)
        clip = PixelwiseClip(0.5, scale=lambda factor=factor: factor)
        latent = clip(image).flatten(1) @ matrix.T
        surrogate = score_distillation_loss(latent, target)
        assert surrogate == 0.5 * target.square().sum()
        (slope,) = torch.autograd.grad(factor * surrogate, latent, retain_graph=True)
        assert torch.equal(slope, factor * target)
        (factor * surrogate).backward()
        wanted = (target @ matrix).reshape(1, 3, 4, 4)
        torch.testing.assert_close(image.grad / factor, pixelwise_clip(wanted, 0.5))


def test_overflow_of_a_score_does_not_reach_the_encoder() -> None:
    latent = torch.randn(3, requires_grad=True)
    score_distillation_loss(latent, torch.tensor([2.0, math.nan, math.inf])).backward()
    assert latent.grad.tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"its latents, \(3,\), got \(2,\)"):
        score_distillation_loss(latent, torch.zeros(2))


def test_upstream_derivatives_are_right_without_clipping() -> None:
    clip = PixelwiseClip(suppression="none")
    image = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clip(x.sin()).square(), image)
    assert torch.autograd.gradgradcheck(lambda x: clip(x.sin()).square(), image)


def test_compiled() -> None:
    clip, g = PixelwiseClip(0.3), gradient(1, 3, 4, 4)
    image = torch.zeros(1, 3, 4, 4, requires_grad=True)
    draw = torch.compile(lambda x: (clip(2 * x) * g).sum(), backend="aot_eager")
    draw(image).backward()
    torch.testing.assert_close(image.grad, 2 * pixelwise_clip(g, 0.3))


def test_what_cannot_be_is_refused() -> None:
    g = gradient()
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        pixelwise_clip(g, -1.0)
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        pixelwise_clip(g, 1.0, norm="l1")
    with pytest.raises(ValueError, match="channel_dim 4 of a 4-D gradient"):
        pixelwise_clip(g, 1.0, channel_dim=4)
    with pytest.raises(ValueError, match="unknown suppression 'pixels': did you mean 'pixel'"):
        suppress(g, 1.0, "pixels")
    for bad in ("quantile:1.5", "quantile", "median:0.5", "quantile:x"):
        with pytest.raises(ValueError, match="a number or 'quantile:Q'"):
            PixelwiseClip(bad)
    with pytest.raises(ValueError, match="threshold must be >= 0"):
        PixelwiseClip(-0.1)
    with pytest.raises(ValueError, match="q must be in"):
        calibrate_threshold(PixelwiseClip(), lambda: None, q=1.0)
