"""Score distillation: its gradient against closed forms, its bound, and pictures it paints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rectiflow.flows import (
    CosinePath,
    FlowModel,
    GaussianField,
    RectifiedPath,
    VariancePreservingPath,
)
from rectiflow.guidance import APG, ClassifierFreeGuidance
from rectiflow.nets import MLP
from rectiflow.optim import PixelwiseClip, pixelwise_clip
from rectiflow.scenes import ScoreDistillation, paint
from rectiflow.training.optimizers import OptimizerSettings

MEAN, STD = torch.tensor([0.5, -0.25, 0.1]), torch.tensor([0.3, 0.2, 0.1])


def gaussian(path, prediction="velocity", mean=MEAN, std=STD) -> FlowModel:
    """The exact model of normal data, by one of its predictions."""
    field = GaussianField(mean.double(), std.double(), path)
    views = {"velocity": field.velocity, "noise": field.noise, "data": field.denoise}
    return FlowModel(views[prediction], path, prediction, shape=tuple(mean.shape))


def drawn(count: int, times: tuple[float, float], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The times and noises of a call, as a generator gives them."""
    generator = torch.Generator().manual_seed(seed)
    t = times[0] + (times[1] - times[0]) * torch.rand(count, generator=generator)
    return t[:, None], torch.randn(count, 3, generator=generator).double()


WEIGHTS = {
    "variance": lambda a, s, da, ds: s**2,
    "signal-variance": lambda a, s, da, ds: a * s**2,
    "inverse-variance": lambda a, s, da, ds: s**-2.0,
    "velocity": lambda a, s, da, ds: (da * s / a - ds).abs(),
    "uniform": lambda a, s, da, ds: torch.ones_like(a),
}


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    "path",
    [RectifiedPath(), VariancePreservingPath(), CosinePath()],
    ids=lambda p: type(p).__name__,
)
def test_gradient_of_normal_data_is_the_closed_form(path, weight, prediction) -> None:
    times = (0.2, 0.9)
    distil = ScoreDistillation(gaussian(path, prediction), weight=weight, times=times)
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z.requires_grad_()
    distil(z, generator=torch.Generator().manual_seed(2)).backward()
    t, noise = drawn(6, times, 2)
    alpha, sigma = path.alpha(t), path.sigma(t)
    state = alpha * z.detach() + sigma * noise
    # The mean of the noise, given a state, of jointly normal noise and state.
    seen = sigma * (state - alpha * MEAN) / (sigma**2 + (alpha * STD) ** 2)
    scale = WEIGHTS[weight](alpha, sigma, path.dalpha(t), path.dsigma(t))
    torch.testing.assert_close(z.grad, scale * (seen - noise), rtol=2e-5, atol=1e-6)


def test_velocity_weight_is_the_residual_of_the_velocity() -> None:
    path, times = RectifiedPath(), (0.3, 0.3)
    model = gaussian(path)
    z = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    distil = ScoreDistillation(model, weight="velocity", times=times)
    distil(z, generator=torch.Generator().manual_seed(0)).backward()
    t, noise = drawn(5, times, 0)
    state = path.interpolate(noise, z.detach(), t[:, 0])
    residual = model.velocity(state, t[:, 0]) - path.velocity(noise, z.detach(), t[:, 0])
    # Down the gradient is along the velocity that is missing.
    torch.testing.assert_close(z.grad, -residual, rtol=1e-5, atol=1e-6)


def test_gradients_go_through_the_encoder_and_are_bounded_behind_it() -> None:
    matrix = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    matrix[:, 5] *= 50
    clip = PixelwiseClip(0.5, norm="l2")
    distil = ScoreDistillation(
        gaussian(RectifiedPath()), encode=lambda x: x.flatten(1) @ matrix.T, clip=clip
    )
    images = torch.zeros(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    distil(images, generator=torch.Generator().manual_seed(4)).backward()
    plain = distil.gradient(
        torch.zeros(2, 3, dtype=torch.float64), torch.Generator().manual_seed(4)
    )
    wanted = (plain @ matrix).view(2, 3, 2, 2)
    torch.testing.assert_close(distil.unclipped, wanted)
    torch.testing.assert_close(images.grad, pixelwise_clip(wanted, 0.5, norm="l2"))
    assert clip.last.fraction > 0
    # Another use of the images is not bounded.
    (1000 * images).sum().backward()
    assert images.grad.max() > 999


def test_guidance_and_its_classifier_part() -> None:
    torch.manual_seed(0)
    model = FlowModel(MLP(shape=(3,), width=16, depth=1, classes=4, zero=False).double())
    model.shape = (3,)
    label = torch.tensor([0, 3])
    z = torch.zeros(2, 3, dtype=torch.float64)

    def found(**options) -> torch.Tensor:
        distil = ScoreDistillation(model, times=(0.5, 0.5), weight="uniform", **options)
        return distil.gradient(z, torch.Generator().manual_seed(0), label=label)

    plain, csd = found(), found(kind="csd")
    guided = found(field=ClassifierFreeGuidance(model, 7.5))
    torch.testing.assert_close(guided, plain + 6.5 * csd)
    assert csd.abs().max() > 1e-3


def test_layers_are_as_they_were() -> None:
    net = MLP(shape=(3,), width=8, depth=1).train()
    seen = []
    net.register_forward_hook(lambda module, *rest: seen.append(module.training))
    distil = ScoreDistillation(FlowModel(net, shape=(3,)))
    image = torch.zeros(1, 3, requires_grad=True)
    distil(image).backward()
    assert seen == [False]
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_a_picture_becomes_what_the_flow_knows() -> None:
    goal = torch.linspace(-0.8, 0.8, 16).view(1, 4, 4)
    distil = ScoreDistillation(gaussian(RectifiedPath(), mean=goal, std=torch.tensor(0.01)))
    start = torch.zeros(2, 1, 4, 4)
    counted = []
    painted = paint(
        distil,
        start,
        steps=150,
        optim=OptimizerSettings(learning_rate=0.05, schedule="cosine", clip_norm=0.0),
        every=40,
        generator=torch.Generator().manual_seed(0),
        progress=counted.append,
    )
    torch.testing.assert_close(painted.images, goal.expand(2, 1, 4, 4), atol=0.02, rtol=0)
    assert torch.equal(start, torch.zeros_like(start))
    assert painted.looked == [0, 40, 80, 120, 149]
    assert painted.before.shape == painted.after.shape == (5, 2, 4, 4)
    assert torch.equal(painted.before, painted.after)
    assert painted.clipped == [0.0] * 5
    assert counted == list(range(1, 151))


def test_pictures_stay_in_range_and_maps_show_the_bound() -> None:
    model = gaussian(RectifiedPath(), mean=torch.full((3, 4, 4), 3.0), std=torch.tensor(0.1))
    distil = ScoreDistillation(model, clip=PixelwiseClip(0.01))
    painted = paint(distil, torch.zeros(1, 3, 4, 4), steps=30, every=10)
    assert painted.images.max() <= 1
    assert painted.after.max() <= 0.01 * (1 + 1e-6)
    assert painted.before.max() > 0.1
    assert painted.clipped[0] > 0.9


def test_the_coordinates_and_the_norm_of_gradients_may_be_bounded() -> None:
    model = gaussian(RectifiedPath(), mean=torch.full((1, 2, 2), 0.5), std=torch.tensor(0.1))
    moved = []
    for options in ({"clip_norm": 1e-3}, {"clip_norm": 0.0}):
        optim = OptimizerSettings(name="sgd", learning_rate=1.0, betas=(0.0, 0.9), **options)
        painted = paint(
            ScoreDistillation(model), torch.zeros(1, 1, 2, 2), steps=1, optim=optim,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        moved.append(painted.images.norm())
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1] > 1e-2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "vsd"}, "unknown kind of score distillation 'vsd'"),
        ({"weight": "varience"}, "did you mean 'variance'"),
        ({"times": (0.9, 0.1)}, "times must be in \\[0, 1\\] and in order"),
        ({"kind": "csd"}, "give a conditional model, or sds"),
    ],
)
def test_misuse_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreDistillation(gaussian(RectifiedPath()), **options)


def test_fields_that_remember_are_refused() -> None:
    model = FlowModel(MLP(shape=(3,), width=8, depth=1, classes=2), shape=(3,))
    with pytest.raises(ValueError, match="set momentum=0"):
        ScoreDistillation(model, APG(model, 5.0, momentum=-0.5))
    with pytest.raises(ValueError, match="leave the field out"):
        ScoreDistillation(model, ClassifierFreeGuidance(model, 2.0), kind="csd")


def test_samples_of_another_shape_are_refused() -> None:
    image = torch.zeros(1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="states must have shape \\(batch, 3\\)"):
        ScoreDistillation(gaussian(RectifiedPath()))(image)


def test_gradients_that_are_not_finite_stop_the_painting() -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.inf

    model = gaussian(RectifiedPath(), mean=torch.zeros(1, 2, 2), std=torch.tensor(0.1))
    distil = ScoreDistillation(model, encode=Overflow.apply)
    with pytest.raises(RuntimeError, match="the gradient at step 0 is not finite"):
        paint(distil, torch.zeros(1, 1, 2, 2), steps=2)
    with pytest.raises(ValueError, match="needs a network's outputs"):
        paint(distil, torch.zeros(1, 1, 2, 2), steps=2, optim=OptimizerSettings(name="sophiag"))


def test_texture_seen_through_a_layer_is_trained() -> None:
    model = gaussian(RectifiedPath(), mean=torch.full((1, 4, 4), 0.5), std=torch.tensor(0.05))
    texture = nn.Parameter(torch.zeros(1, 1, 2, 2))
    distil, optimizer = ScoreDistillation(model), torch.optim.Adam([texture], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        distil(nn.functional.interpolate(texture, scale_factor=2), generator=generator).backward()
        optimizer.step()
    torch.testing.assert_close(texture.detach(), torch.full((1, 1, 2, 2), 0.5), atol=0.1, rtol=0)
