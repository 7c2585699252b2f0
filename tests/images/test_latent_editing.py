from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rectiflow.flows import FlowModel, GaussianField, VarianceExplodingPath
from rectiflow.flows.metrics import round_trip_error
from rectiflow.images import decode, edit_latent, encode, vary

MEAN, STD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gaussian_latents_are_standardised_data() -> None:
    field = GaussianField(MEAN, STD)
    images = MEAN + STD * normal(7, 2)
    latents = encode(field, images, steps=100, solver="rk4", batch_size=3)
    # RK4 errs by less than 1e-5 at 100 steps; float32 adds its rounding.
    torch.testing.assert_close(latents, (images - MEAN) / STD, rtol=0, atol=2e-5)
    back = decode(field, latents, steps=100, solver="rk4", batch_size=3)
    torch.testing.assert_close(back, images, rtol=0, atol=5e-5)


def test_latents_have_unit_scale_on_a_path_with_a_wide_source() -> None:
    path = VarianceExplodingPath()
    field = GaussianField(torch.zeros(2), torch.ones(2), path)
    latents = normal(6, 2)
    start = path.sigma(torch.zeros(()))
    # Half-way points crowd where the noise is small: a grid even in log sigma is not needed here.
    images = decode(field, latents, steps=400, solver="rk4")
    expected = field.transport(latents * start)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    back = encode(field, images, steps=400, solver="rk4")
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-3)


def test_solver_order_shows_in_the_round_trip() -> None:
    field = GaussianField(MEAN, STD)
    images = MEAN + STD * normal(50, 2)

    def error(steps: int) -> float:
        back = vary(field, images, keep=1.0, steps=steps, solver="euler")
        return (back - images).square().mean(1).sqrt().mean().item()

    assert error(40) == pytest.approx(
        round_trip_error(field, images, 40, "euler").mean().item(), rel=1e-4
    )
    # Euler is of first order.
    assert 1.6 < error(40) / error(80) < 2.4


def test_edit_shrinks_without_a_generator() -> None:
    latents = normal(3, 2, 4)
    torch.testing.assert_close(edit_latent(latents, 0.25), 0.25 * latents)
    assert torch.equal(edit_latent(latents, 1), latents)


def test_random_edit_keeps_normal_latents_normal() -> None:
    latents = normal(40_000, 2)
    generator = torch.Generator().manual_seed(1)
    edited = edit_latent(latents, 0.6, generator=generator)
    # Four standard errors: 1 / sqrt(2n) for a deviation, 1 / sqrt(n) for a correlation.
    bound = 4 / math.sqrt(80_000)
    assert abs(edited.std().item() - 1) < bound
    assert abs((edited * latents).mean().item() - 0.6) < 2 * bound
    again = edit_latent(latents, 0.6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(edited, again)
    assert torch.equal(edit_latent(latents, 1, generator=generator), latents)


def test_vary_moves_gaussian_data_toward_their_mean() -> None:
    field = GaussianField(MEAN, STD)
    images = MEAN + STD * normal(5, 2)
    found = vary(field, images, keep=0.5, steps=100, solver="rk4")
    torch.testing.assert_close(found, MEAN + 0.5 * (images - MEAN), rtol=0, atol=5e-5)


def test_condition_rows_follow_their_images() -> None:
    def net(x: Tensor, t: Tensor, *, shift: Tensor) -> Tensor:
        return torch.ones_like(x) * shift[:, None]

    model, shift = FlowModel(net), torch.arange(5.0)
    latents = encode(model, torch.zeros(5, 1), steps=2, batch_size=2, shift=shift)
    torch.testing.assert_close(latents, -shift[:, None])


@pytest.mark.parametrize("keep", [-0.1, 1.1, math.nan])
def test_refuses_a_share_outside_0_to_1(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be in"):
        edit_latent(torch.zeros(1, 1), keep)


def test_modules_are_left_in_their_mode() -> None:
    model = FlowModel(torch.nn.Identity()).train()
    model.net.forward = lambda x, t: x
    vary(model, torch.ones(1, 2), steps=2)
    assert model.training
