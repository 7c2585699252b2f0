"""Divergences: every weight against automatic differentiation, and functions of the user's own."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill.divergences import DIVERGENCES, Divergence, curvature_weight, resolve

RATIOS = torch.logspace(-2.5, 2.5, 41, dtype=torch.float64)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_invariant_1_weights_are_curvatures(name):
    entry = DIVERGENCES[name]
    # Both sides in float64: what is left is the rounding of a few operations.
    expected = curvature_weight(entry.f, RATIOS)
    torch.testing.assert_close(entry.weight(RATIOS), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_entries_vanish_for_equal_densities_and_pass_the_check(name):
    entry = DIVERGENCES[name]
    assert entry.f(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-15)
    own = resolve(entry.f, low=0.005, high=200.0)
    torch.testing.assert_close(own.weight(RATIOS), entry.weight(RATIOS), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "name, rising", [("sf", False), ("neyman", False), ("js", True), ("sh", True), ("kl", True)]
)
def test_seeking_weights_fall_and_covering_weights_rise(name, rising):
    steps = DIVERGENCES[name].weight(RATIOS).diff()
    assert bool((steps > 0).all()) is rising


def test_only_the_reverse_divergence_is_constant():
    assert [name for name, entry in DIVERGENCES.items() if entry.constant] == ["rkl"]
    weights = DIVERGENCES["rkl"].weight(RATIOS)
    assert weights.shape == RATIOS.shape
    assert torch.equal(weights, torch.ones_like(RATIOS))


def test_weights_keep_dtype_and_carry_no_gradient():
    own = resolve(lambda r: r**4)
    ratio = torch.tensor([0.5, 2.0], requires_grad=True)
    found = own.weight(ratio)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, 12 * ratio.detach() ** 4)
    with torch.no_grad():
        torch.testing.assert_close(own.weight(ratio), found)


def test_names_and_entries_are_resolved():
    entry = Divergence("mine", torch.square, lambda r: 2 * r.square())
    assert resolve(entry) is entry
    assert resolve("js") is DIVERGENCES["js"]
    with pytest.raises(ValueError, match="unknown divergence 'jss': did you mean 'js'"):
        resolve("jss")


@pytest.mark.parametrize(
    "f, message",
    [
        (torch.sqrt, r"'sqrt' is not convex on ratios from 0.1 to 20 .*at 0.1 is negative"),
        (lambda r: -((r - 5) ** 2), "is not convex"),
        (torch.sin, "is not convex"),
        (lambda r: (r - 3) ** 3, "is not convex"),
        (lambda r: 2 * r + 1, "is linear on ratios from 0.1 to 20"),
        (lambda r: torch.ones_like(r), "is linear"),
        (lambda r: (r - 1) ** 2.5, "is not finite"),
        (lambda r: r**400, "is not finite"),
    ],
)
def test_functions_that_are_no_divergence_are_refused(f, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(f)
    assert "\n" not in str(error.value)


def test_convexity_is_asked_for_on_the_given_ratios_only():
    def bent(r):
        return (r - 3) ** 3

    assert resolve(bent, low=3.0, high=9.0).name == "bent"
    with pytest.raises(ValueError, match="not convex on ratios from 2 to 9"):
        resolve(bent, low=2.0, high=9.0)
