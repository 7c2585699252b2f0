"""Costs: exact gradients, composition, and one sentence for bad input."""

from __future__ import annotations

import pytest
import torch

from rectiflow.guidance import Classifier, Custom, Decoded, LinearInverse, Masked
from rectiflow.guidance.costs import Cost
from rectiflow.images.degradations import Blur, Downscale, Mask, box_mask, gaussian_kernel

IMAGE = (1, 8, 8)
MASK = Mask(box_mask(IMAGE, 4))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1) @ draw(64, 5, seed=3)


COSTS: dict[str, Cost] = {
    "inpaint": LinearInverse(MASK, MASK.A(draw(3, *IMAGE, seed=1))),
    "sr, mean": LinearInverse(Downscale(2), draw(1, 1, 4, 4, seed=1), "mean"),
    "deblur": LinearInverse(Blur(gaussian_kernel(5, 1.0)), draw(3, *IMAGE, seed=1)),
    "masked": Masked(draw(3, *IMAGE, seed=1), box_mask(IMAGE, 4)),
    "masked, mean": Masked(draw(1, *IMAGE, seed=1), box_mask(IMAGE, 4), "mean"),
    "classifier": Classifier(logits, torch.tensor([0, 4, 2]), normalised=False),
    "custom": Custom(lambda x: x.flatten(1).cos().sum(1)),
    "decoded": Decoded(Masked(draw(1, 64, seed=1), torch.ones(64)), lambda z: z.flatten(1).tanh()),
}
COSTS["sum"] = COSTS["inpaint"] + 0.3 * COSTS["classifier"]


@pytest.fixture(params=COSTS)
def cost(request) -> Cost:
    return COSTS[request.param]


def test_gradient_is_the_derivative_of_the_cost(cost):
    x = draw(3, *IMAGE)
    value, slope = cost.gradient(x)
    free = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(cost(free).sum(), free)
    torch.testing.assert_close(slope, wanted)
    torch.testing.assert_close(value, cost(x))
    assert not value.requires_grad
    assert not slope.requires_grad


def test_samples_are_independent(cost):
    x = draw(3, *IMAGE)
    other = x.clone()
    other[0] += 1
    one, two = cost.gradient(x), cost.gradient(other)
    assert not torch.equal(one[1][0], two[1][0])
    assert torch.equal(one[1][1:], two[1][1:])


def test_works_without_gradients_and_in_inference_mode(cost):
    x = draw(3, *IMAGE)
    wanted = cost.gradient(x)[1]
    with torch.no_grad():
        assert torch.equal(cost.gradient(x)[1], wanted)
    with torch.inference_mode():
        assert torch.equal(cost.gradient(x + 0)[1], wanted)


@pytest.mark.parametrize("name", ["inpaint", "sr, mean", "deblur", "masked", "masked, mean"])
def test_curvature_bounds_the_second_derivative(name):
    x, move = draw(3, *IMAGE), draw(3, *IMAGE, seed=7)
    cost = COSTS[name]
    change = (cost.gradient(x + move)[1] - cost.gradient(x)[1]).flatten(1).norm(dim=1)
    most = 2 * cost.curvature(IMAGE) * move.flatten(1).norm(dim=1)
    assert (change <= most * (1 + 1e-9)).all()


def test_curvature_of_sums_and_scales():
    assert (COSTS["masked"] + 3 * COSTS["masked"]).curvature(IMAGE) == 4
    assert COSTS["sum"].curvature(IMAGE) is None


def test_gradient_is_zero_in_the_hole():
    for name in ("inpaint", "masked"):
        slope = COSTS[name].gradient(draw(3, *IMAGE))[1]
        assert not slope[..., 2:6, 2:6].any()
        assert slope[..., 0, :].all()


def test_normalised_classifier_has_unit_rms_and_survives_certainty():
    cost = Classifier(logits, 1)
    slope = cost.gradient(draw(2, *IMAGE))[1]
    torch.testing.assert_close(slope.square().mean((1, 2, 3)), torch.ones(2).double())
    certain = Classifier(lambda x: 0 * logits(x) + torch.tensor([0.0, 1e6, 0, 0, 0]), 1)
    assert not certain.gradient(draw(2, *IMAGE))[1].any()


def test_a_decoded_classifier_does_not_ask_how_large_its_logits_are():
    found = [
        Decoded(Classifier(lambda x, s=s: s * logits(x), 1), lambda z: 3 * z).gradient(
            draw(2, *IMAGE) / 10
        )[1]
        for s in (1e-3, 1e-6)
    ]
    # Small logits leave the direction as it is.
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[0].square().mean((1, 2, 3)), torch.full((2,), 9.0).double())
    curved = Decoded(Classifier(logits, 1), torch.tanh)
    slope = Classifier(logits, 1).gradient(draw(2, *IMAGE).tanh())[1]
    wanted = slope * (1 - draw(2, *IMAGE).tanh().square())
    torch.testing.assert_close(curved.gradient(draw(2, *IMAGE))[1], wanted)


def test_a_function_that_ignores_the_data_has_no_gradient():
    with pytest.raises(ValueError, match="no gradient with respect to the data"):
        Custom(lambda x: torch.ones(len(x))).gradient(draw(2, 3))
    with pytest.raises(ValueError, match="the decoder has no gradient"):
        Decoded(Custom(lambda x: x.sum(1)), torch.Tensor.detach).gradient(draw(2, 3))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Custom(lambda x: x.sum())(draw(2, 3)), "one number for each of the 2 samples"),
        (lambda: Custom(lambda x: 1.0)(draw(2, 3)), "got float"),
        (lambda: LinearInverse(MASK, torch.full((1, *IMAGE), torch.nan)), "must be finite"),
        (lambda: LinearInverse(MASK, draw(1, *IMAGE), "max"), "unknown reduction 'max'"),
        (lambda: LinearInverse(MASK, draw(2, *IMAGE))(draw(3, *IMAGE)), "measurements must have"),
        (lambda: LinearInverse(Downscale(2), draw(1, *IMAGE))(draw(1, *IMAGE)), "must have shape"),
        (lambda: Masked(draw(1, *IMAGE), torch.ones(4, 4)), r"the mask has shape \(4, 4\)"),
        (lambda: Masked(draw(1, *IMAGE), 2 * torch.ones(8, 8)), r"values in \[0, 1\]"),
        (lambda: Masked(draw(2, *IMAGE), torch.ones(8, 8))(draw(3, *IMAGE)), "references must"),
        (lambda: Classifier(logits, 5)(draw(2, *IMAGE)), "labels must be in 0 to 4"),
        (lambda: Classifier(lambda x: x, 0)(draw(2, *IMAGE)), "logits of shape"),
        (lambda: -1 * COSTS["masked"], "finite and >= 0, got -1"),
        (lambda: float("nan") * COSTS["masked"], "finite and >= 0, got nan"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ValueError, match=said):
        make()
